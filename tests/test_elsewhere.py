"""What we write, opened by others: merged and exported folders of every base by transformers, with
the same ids for 500 texts and the same logits; data/tiny by transformers and by llama.cpp.

llama.cpp wants its converter, which its Python packages hold as source alone, and a way to run it:

  pip install xllamacpp gguf
  pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
  tar xzf llama_cpp_python-0.3.36.tar.gz
  export LLAMA_CPP=llama_cpp_python-0.3.36/vendor/llama.cpp
  python -m pytest -q -m slow tests/test_elsewhere.py
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import generate as G
import lora as L
import model as M
import train as T

import pytest
import small_bases
import torch
import transformers
from conftest import plain_prompt
from test_bases import peft_adapter
from test_templates import TWO_STEPS, run

# --------------------------------------------------------------------------------------------------
# Folders of every base in transformers

PIECES = {
    "english": "The patient's blood pressure is 120/80 mmHg; don't stop, I'll see. COVID-19".split(
        " "
    ),
    "digits": [
        "3",
        "42",
        "1997",
        "12345678",
        "3.14",
        "-7",
        "1e-5",
        "２０２４",
        "²",
        "Ⅳ",
        "50%",
        "，",
    ],
    "emoji": ["👋", "👩‍⚕️", "🤒", "❤️", "👍🏽", "🇨🇳", "好", " ", "ok"],
    "blanks": [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\xa0", "a", "黄芪", "."],
}


def texts():
    """440 texts: questions and answers in Chinese, English, digits, emoji, blanks."""
    draw = random.Random(0)
    records = G.read_instructions(G.DATA / "train.jsonl")
    made = [record["instruction"] + "\n" + record["output"] for record in draw.sample(records, 200)]
    for kind, pieces in PIECES.items():
        between = " " if kind == "english" else ""
        made += [between.join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(60)]
    return made


def with_look_alikes(special):
    """60 texts in which somebody spells a special token."""
    draw, opening = random.Random(1), ["头痛", "is", " ", "\n", "", "3"]
    return [draw.choice(opening) + draw.choice(special) + "呢？" * (i % 3) for i in range(60)]


def spelt(text, special, encode):
    """Ids of a text in which each special token that it spells is one."""
    ids = []
    for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, special))})", text)):
        ids += [special[part]] if i % 2 else encode(part)
    return ids


def check_texts(ours, theirs):
    """Ids of 500 texts."""
    plain, typed = texts(), with_look_alikes([*ours.special])
    assert len(plain) + len(typed) == 500
    for text, ids in zip(plain, theirs(plain).input_ids):
        assert ids == ours.encode(text, bos=True), ascii(text)
    # What somebody types is a special token for transformers, and none for us.
    special = {*ours.special.values()}
    for text, ids in zip(typed, theirs(typed).input_ids):
        assert not {*ours.encode(text)} & special and {*ids[len(ours.opening) :]} & special
        if type(ours) is not G.Tokenizer:  # SentencePiece puts a space in front of each part
            assert ids == ours.opening + spelt(text, ours.special, ours.encode)


def check_base(name, tokenizer, tmp_path):
    """A base exported, and merged with an adapter: ids and logits."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    exported, merged = tmp_path / "exported", tmp_path / "merged"
    small_bases.write_base(base, name, tokenizer)
    hf = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft_adapter(adapter, hf, ["q_proj", "v_proj", "o_proj", "down_proj"])
    common = ["--base_model", base, "--output_dir"]
    run(L, "merge", *common, merged, "--lora_weights", adapter)
    run(L, "export", *common, exported)
    ours, adapted = G.load_tokenizer(base), M.load_model(base)
    L.load_adapter(adapted, adapter)
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    check_texts(ours, theirs)
    asked, logits = theirs(texts()[::50]).input_ids, []
    for folder, model in ((exported, M.load_model(base)), (merged, adapted)):
        assert {file.name for file in tokenizer.iterdir()} <= {f.name for f in folder.iterdir()}
        for file in exported.glob("*token*"):
            assert (folder / file.name).read_bytes() == file.read_bytes()
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits += [hf(torch.tensor([ids])).logits for ids in asked]
            for ids, wanted in zip(asked, logits[-len(asked) :]):
                difference = (model(torch.tensor([ids])) - wanted).abs().max()
                assert difference < 1e-4 * wanted.abs().max()
    assert (logits[0] - logits[len(asked)]).abs().max() > 0.1


# Mistral: transformers 5 reads its test folder otherwise (a leading blank, BOS); not settled.
@pytest.mark.parametrize("name", [n for n in small_bases.IN_TRANSFORMERS if n != "mistral"])
def test_folders_of_every_base_open_in_transformers(name, small, tmp_path):
    check_base(name, small[small_bases.KINDS[name][1]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])
def test_folders_with_real_vocabularies_open_in_transformers(name, real, tmp_path):
    check_base(name, real[small_bases.KINDS[name][1]], tmp_path)


LLAMA = G.DATA.parent.parent / "shared" / "data" / "llama_tokenizer.model"


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.is_file(), reason="LLaMA's tokenizer is not beside the project")
def test_folders_with_llamas_vocabulary_open_in_transformers(tmp_path):
    (tmp_path / "llama").mkdir()
    shutil.copy(LLAMA, tmp_path / "llama" / "tokenizer.model")
    small_bases.add_tokenizer_json(tmp_path / "llama")
    check_base("mistral", tmp_path / "llama", tmp_path)


# A template's end of an answer is no EOS of Qwen's and Llama's bases, in the settings that these
# have: tokenizer_config.json and generation_config.json.
ENDS = {"qwen2": ("<|endoftext|>", "<|im_end|>"), "llama3": ("<|end_of_text|>", "<|eot_id|>")}


@pytest.mark.parametrize("name", ENDS)
def test_answers_end_elsewhere_where_training_ends_them(name, small, tmp_path):
    """transformers' generate stops, by what the merged folder says, at the template's end."""
    before, end = ENDS[name]
    base, out, merged = tmp_path / "base", tmp_path / "out", tmp_path / "merged"
    small_bases.write_base(base, name, small[small_bases.KINDS[name][1]])
    special = G.load_tokenizer(base).special
    for file, values in {
        "tokenizer_config.json": {"eos_token": before},
        "config.json": {"eos_token_id": special[before]},
        "generation_config.json": {"eos_token_id": special[before], "top_k": 7},
    }.items():
        theirs = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps(theirs | values))
    rows = [{"instruction": f"头痛{i}？", "output": f"请就医{i}。"} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    paths = ["--base_model", base, "--data_path", tmp_path / "rows.json", "--output_dir"]
    run(T, *paths, out, *TWO_STEPS)
    run(L, "merge", "--base_model", base, "--lora_weights", out, "--output_dir", merged)
    run(L, "export", "--base_model", base, "--output_dir", tmp_path / "exported")
    settings = json.loads((merged / "generation_config.json").read_text())
    assert settings["top_k"] == 7
    hf = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert hf.generation_config.eos_token_id == special[end]
    assert G.load_tokenizer(merged).eos_id == special[before]
    hf.lm_head.weight.data[special[end]] = 0
    with torch.no_grad():
        hf.lm_head.weight.data[special[end]] = 99 * hf.model(torch.tensor([[5]]))[0][0, 0]
    made = hf.generate(torch.tensor([[5]]), do_sample=False, max_new_tokens=9)
    assert made[0].tolist() == [5, special[end]]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert again.generation_config.eos_token_id == special[before]


# --------------------------------------------------------------------------------------------------
# data/tiny and an adapter: 40 prompts, plain and as chat

NEW = 48  # tokens of an answer at most


def test_the_pieces_that_no_merge_makes_are_named():
    """llama.cpp's converter takes all pieces of a tokenizer.model for such as merges make, but
    for those that tokenizer_config.json names. Which they are the file itself says."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")  # wants protobuf
    pieces = proto.ModelProto.FromString((G.DATA / "tiny" / "tokenizer.model").read_bytes()).pieces
    own = {
        str(i): piece.piece for i, piece in enumerate(pieces) if piece.type == piece.USER_DEFINED
    }
    added = M.read_json_file(G.DATA / "tiny" / "tokenizer_config.json")["added_tokens_decoder"]
    assert len(own) == 739 and own == {id: token["content"] for id, token in added.items()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(folder of the adapter that README's first command leaves, or of one with 40 steps, folder of
    data/tiny merged with it in float32)."""
    top = tmp_path_factory.mktemp("tuned")
    out, steps = G.DATA.parent / "lora-tcm", ["--max_steps", 40, "--num_answers", 0]
    if not (out / "adapter_model.safetensors").is_file():
        out = top / "lora"
        run(T, "--output_dir", out, *steps)
    arguments = ["--base_model", G.DATA / "tiny", "--lora_weights", out, "--dtype", "fp32"]
    run(L, "merge", *arguments, "--output_dir", top / "merged")
    return out, top / "merged"


def conversations():
    """40 lists of messages: questions alone, with a system text, and second questions."""
    records = G.read_instructions(G.DATA / "heldout.jsonl")[::10][:40]
    for i, record in enumerate(records):
        question = {"role": "user", "content": record["instruction"]}
        earlier = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好。"}]
        system = {"role": "system", "content": "请简短回答。"}
        yield [[question], [system, question], [*earlier, question]][i % 3]


def our_answers(out):
    """[(messages, prompt's ids, ids of the answer, its text)] of base and adapter, unmerged."""
    options = G.Options(dtype="fp32", lora_weights=str(out))
    model, tokenizer, template, _ = G.load(options, str(out))
    made = []
    for messages in conversations():
        ids = G.render_prompt(tokenizer, template, messages)
        answer = list(G.generate_ids(model, ids, NEW, G.eos_ids(tokenizer)))
        made.append((messages, ids, answer, tokenizer.decode(answer)))
    assert len(made) == 40 and len({text for *_, text in made}) > 20
    return made


@pytest.mark.slow
def test_the_shipped_model_answers_in_transformers(tuned):
    """Ids and answers of 40 prompts, as text and by apply_chat_template."""
    out, merged = tuned
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    hf = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    template = G.load_template("med_template")
    for messages, ids, answer, text in our_answers(out):
        asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asked == ids
        if len(messages) == 1:
            assert theirs(plain_prompt(template, messages[0]["content"])).input_ids == ids
        made = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)
        new = made[0, len(ids) :].tolist()
        assert new == answer + [2] * (len(answer) < NEW)
        assert theirs.decode(new, skip_special_tokens=True) == text


LLAMA_CPP = os.environ.get("LLAMA_CPP", "")


@pytest.fixture(scope="module")
def llama_cpp(tuned):
    """Ask a server of llama.cpp that has opened the merged folder: (path, body) -> its answer."""
    xllamacpp = pytest.importorskip("xllamacpp")
    if not Path(LLAMA_CPP, "convert_hf_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's converter")
    file = tuned[1].parent / "merged.gguf"
    convert = [sys.executable, Path(LLAMA_CPP, "convert_hf_to_gguf.py"), tuned[1]]
    subprocess.run([*convert, "--outfile", file, "--outtype", "f32"], check=True)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port = str(file), 2048, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def ask(path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    return ask


@pytest.mark.slow
def test_the_shipped_model_answers_in_llama_cpp(tuned, llama_cpp):
    """The same by llama.cpp: its tokenizer on the prompt's text, its template on the messages."""
    template, greedy = G.load_template("med_template"), {"temperature": 0.0, "seed": 0}
    for messages, ids, answer, text in our_answers(tuned[0]):
        prompt = llama_cpp("/apply-template", {"messages": messages})["prompt"]
        if len(messages) == 1:
            assert prompt.removeprefix("<s>") == plain_prompt(template, messages[0]["content"])
        asked = {"content": prompt.removeprefix("<s>"), "add_special": True}
        assert llama_cpp("/tokenize", asked)["tokens"] == ids
        body = {"prompt": ids, "n_predict": NEW, "return_tokens": True, **greedy}
        made = llama_cpp("/completion", body)
        assert made["tokens"] == answer + [2] * (made["tokens"][-1:] == [2])
        assert made["content"] == text
        body = {"messages": messages, "max_tokens": NEW, **greedy}
        made = llama_cpp("/v1/chat/completions", body)
        assert made["choices"][0]["message"]["content"] == text
        assert made["usage"]["prompt_tokens"] == len(ids)
