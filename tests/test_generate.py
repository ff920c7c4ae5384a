"""generate.py: templates to the byte, streaming, decoding against full recomputation, the command
line."""

import json
import subprocess
import sys

import generate as G

import pytest
import torch
from conftest import ROOT, plain_prompt

MED = "下面是一个问题，运用医学知识来正确回答提问.\n### 问题:\n{instruction}\n### 回答:\n"
CONSTANTS = {
    "med_template": (MED, MED, "### 回答:"),
    "literature_template": (
        None,
        "以下是描述任务的说明，编写适当地回复完成请求的响应。\n\n ### 说明:\n"
        "{instruction}\n\n### 回复:\n",
        "### 回复:",
    ),
    "bloom_deploy": (
        "下面是一个问题，运用医学知识来正确回答提问.\n{instruction}\n\n\n### 回答：\n",
        "下面是一个问题，运用医学知识来正确回答提问.\n{instruction}\n### 回答：\n",
        "### 回答：",
    ),
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n### "
        "Instruction:\n{instruction}\n\n### Input:\n{input}"
        "\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
        "### Response:",
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_templates_are_the_published_ones(name):
    """The prompts that published adapters were trained with, byte for byte."""
    template, (with_input, without, split) = G.load_template(name), CONSTANTS[name]
    assert template["prompt_no_input"] == without and template["response_split"] == split
    assert template["prompt_input"] == (with_input or without)
    assert plain_prompt(template, "a{b}") == without.replace("{instruction}", "a{b}")


@pytest.mark.parametrize(
    "text",
    [
        {"prompt_no_input": "{instruction} {foo}"},
        {"prompt_no_input": "{instruction} {0}"},
        {"prompt_no_input": '{instruction} {"a": 1}'},
        {"prompt_no_input": "{instruction} {"},
        {"prompt_no_input": "{instruction}}"},
        {"prompt_no_input": "{{instruction}}"},
        {"prompt_input": "{instruction}"},
        {"prompt_no_input": 3},
        {"prompt_no_input": "{instruction}", "prompt_input": "{instruction}{input.x}"},
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(json.dumps(text))
    with pytest.raises(
        ValueError,
        match=r"a.json: .*\{instruction\}",
    ):
        G.load_template(tmp_path / "a.json")


def test_doubled_braces_stand_for_themselves(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt_no_input": "{{\\"a\\": {{{instruction}}}}}"}')
    assert G.render(G.load_template(tmp_path / "a.json"), [{"role": "user", "content": "{x}"}]) == (
        '\ud800bos\ud800{"a": {{x}}}',
        "",
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"instruction": "a", "history": 5}', "line 1: .*instruction and output"),
        ("[" * 200000, "JSON array"),
        ('{"instruction": "a"}\n{"instruction": ' + "[" * 200000, "line 2 is not JSON"),
        ('{"instruction": "a"}\n{"instruction": "\\ud800"}', "line 2.*character"),
        (
            '[\n{"instruction": "a"},\n{"instruction": "a", "output": "\\udfff"}]',
            "record 2.*character",
        ),
        ('[\n{"instruction": "a"},\n{"instruction": "b"},\n{"instruction": 5}]', "record 3: "),
        ('[\n{"instruction": "a"},\n5]', "record 2 holds a int"),
    ],
)
def test_a_bad_file_is_one_line_with_the_record(tmp_path, text, said):
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match=said):
        G.read_instructions(tmp_path / "a")


def test_half_a_character_is_no_text(base):
    tokenizer = G.load_tokenizer(base)
    for encode in (tokenizer.encode, tokenizer.encode_answer):
        with pytest.raises(ValueError, match=r"ud800.*surrogates"):
            encode("黄芪\ud800")


def test_turns_keep_the_leading_space():
    assert G.render_turns([("甲", "乙")], "丙") == " <user>: 甲 <bot>: 乙 <user>: 丙"


def test_streaming_never_shows_half_a_character(base):
    """Each of these characters falls to three bytes in the test's tokenizer."""
    tokenizer, text = G.load_tokenizer(base), "患者癫痫发作，黄芪与柴胡"
    ids = tokenizer.encode_answer(text)
    assert len(ids) > len(text)  # bytes indeed
    shown = [G.visible(tokenizer.decode(ids[:n]), ended=False) for n in range(len(ids) + 1)]
    assert shown[-1] == tokenizer.decode(ids) == text
    assert all(text.startswith(part) for part in shown) and len(set(shown)) == len(text) + 1
    assert G.visible(tokenizer.decode(ids[:-1])) == text[:-1]  # cut inside the last character


def test_answer_ids_are_those_of_the_joint_encoding(base):
    tokenizer = G.load_tokenizer(base)
    prompt = plain_prompt(G.load_template("med_template"), "黄芪有什么功效？")
    for answer in ("黄芪的功效是补气。", " leading space", "a\nb", "的功效是"):
        assert tokenizer.encode(prompt) + tokenizer.encode_answer(answer) == tokenizer.encode(
            prompt + answer
        )


def test_greedy_equals_full_recomputation(base):
    """The cached decode against a forward over everything at each step."""
    model, tokenizer = G.load_base(base, "cpu", torch.float32)
    ids = tokenizer.encode("黄芪有什么功效", bos=True)
    got = list(G.generate_ids(model, ids, 20))
    for token in got:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = ids + [token]
    assert len(got) == 20
    assert (
        list(G.generate_ids(model, ids[:-20], 20, eos_id=got[3])) == got[: got.index(got[3])]
    )  # stops before EOS


def test_sampling_follows_the_filtered_distribution():
    """20,000 draws against the exact distribution: top-k and top-p keep what their definitions
    say."""
    logits, generator = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]), torch.Generator().manual_seed(0)
    p = (logits / 0.8).softmax(-1)
    for top_k, top_p, kept in [
        (0, 1.0, 5),
        (3, 1.0, 3),
        (0, 0.6, 1 if p[0] >= 0.6 else 2),
        (2, 0.9, 2),
    ]:
        want = torch.where(torch.arange(5) < kept, p, 0.0)
        draws = torch.tensor(
            [G.sample(logits, G.Decoding(1, 0.8, top_k, top_p), generator) for _ in range(20000)]
        )
        share = torch.bincount(draws, minlength=5) / 20000
        assert (share - want / want.sum()).abs().max() < 0.02 and (share[kept:] == 0).all()
    assert G.sample(logits, G.Decoding(1, 0, 1, 0.1)) == 0


def test_command_line_asks_files_and_chats(base, records, tmp_path):
    def call(*args, stdin=""):
        return subprocess.run(
            [
                sys.executable,
                ROOT / "generate.py",
                "--base_model",
                base,
                "--use_lora=False",
                "--max-new-tokens",
                "8",
                *args,
            ],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    out = tmp_path / "answers.jsonl"
    done = call("--instruct_dir", records, "--output", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert done.returncode == 0 and len(rows) == 8 and done.stdout == ""
    chat = call(
        "--single_or_multi",
        "multi",
        "--seed",
        "1",
        "--temperature",
        "0.5",
        stdin="你好\n/reset\n再见\n",
    )
    assert chat.returncode == 0 and "no medical advice" in chat.stderr
