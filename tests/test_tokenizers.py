"""Tokenizers of all kinds against those that made them: tiktoken, tokenizers, transformers and
SentencePiece. The real vocabularies of Qwen and Llama-3 come from two packages, of which nothing is
imported: pip install --no-deps dashscope==2.0.2 llama-models==0.3.0 (and tiktoken)."""

import importlib.util
import json
import random
import shutil
import sys
import time
import unicodedata
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import generate as G
import model as M
import train as T

import pytest
import sentencepiece
from conftest import RECORDS, make_config, plain_prompt
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

BENTSAO = G.DATA.parent.parent / "shared" / "data"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
# what is not in the two above: \P, and a quantifier that gives nothing back, as OpenAI's has
OTHER = r"[^\r\n\p{L}\p{N}]?+\p{L}+(?i:'s|'t)?|\p{N}{1,2}|\s+(?!\S)|\P{L}{1,3}"

ALL = [
    c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs")
]
OFTEN = list(
    " \t\r\n\u3000\xa0\x85\u2028\u1680\x1c\x1f'’0123456789²ⅣabcstSTſKdlL,.!?，。：é\u0301\u0300"
    "\u0345Āﬁㆍंя한글患者癫痫👋🏽\u200d👩<|>"
)


def random_texts(count, seed=0):
    """Strings of characters of all planes, most of them such as cut words and marks."""
    draw = random.Random(seed)
    return [
        "".join(
            draw.choice(OFTEN if draw.random() < 0.7 else ALL) for _ in range(draw.randrange(40))
        )
        for _ in range(count)
    ]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


def real_vocabulary(package, file):
    spec = importlib.util.find_spec(package)
    if not spec:
        pytest.skip("pip install --no-deps dashscope==2.0.2 llama-models==0.3.0")
    return Path(spec.submodule_search_locations[0], file)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """{kind: (our tokenizer, tiktoken's)} of the real vocabularies: Llama-3's in Meta's file,
    Qwen's in a tokenizer.json that transformers makes of Qwen's file."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # none
    folder, made = tmp_path_factory.mktemp("real"), {}
    for kind, pattern, package, file in (
        ("llama3", LLAMA3, "llama_models", "llama3/tokenizer.model"),
        ("qwen", QWEN, "dashscope", "resources/qwen.tiktoken"),
    ):
        source = str(real_vocabulary(package, file))
        (folder / kind).mkdir()
        if kind == "llama3":
            shutil.copy(source, folder / kind / "tokenizer.model")
        else:
            names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            converted = TikTokenConverter(source, QWEN, extra_special_tokens=names).converted()
            converted.save(str(folder / kind / "tokenizer.json"))
            write(folder / kind / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
        ours = G.load_tokenizer(folder / kind)
        ranks = load_tiktoken_bpe(source)
        theirs = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ours.special
        )
        made[kind] = ours, theirs
    monkeypatch.undo()
    return made


KINDS = ["llama3", "qwen"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_as_tiktoken_encodes_them(real, kind):
    ours, theirs = real[kind]
    for text in random_texts(10000):
        assert ours.encode(text) == theirs.encode_ordinary(text), ascii(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not BENTSAO.is_dir(), reason="BenTsao's records are not beside the project")
def test_bentsaos_records_as_tiktoken_encodes_them(real, kind):
    ours, theirs = real[kind]
    records = G.read_instructions(BENTSAO / "bentsao_llama_data.json", answers=True)
    texts = [record["instruction"] + "\n" + record["output"] for record in records]
    assert len(texts) == 8658
    assert [ours.encode(text) for text in texts] == [theirs.encode_ordinary(text) for text in texts]


def test_special_ids_are_the_published_ones(real):
    llama3, qwen = real["llama3"][0], real["qwen"][0]
    assert llama3.vocab_size == 128256 and llama3.bos_id == 128000 and llama3.eos_id == 128001
    known = {
        "<|begin_of_text|>": 128000,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|reserved_special_token_247|>": 128255,
    }
    assert known.items() <= llama3.special.items()
    assert qwen.bos_id is None and qwen.eos_id == qwen.special["<|im_end|>"] == 151645
    assert qwen.special["<|im_start|>"] == 151644 and qwen.vocab_size == 151646
    assert qwen.encode("a", bos=True, eos=True) == [*qwen.encode("a"), 151645]
    assert llama3.encode("a", bos=True)[0] == 128000


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_word_takes_no_quadratic_time(real, kind):
    """A client's request may be 256 KiB of one word."""
    started = time.process_time()
    ids = real[kind][0].encode("ab" * 40000)
    assert real[kind][0].decode(ids) == "ab" * 40000
    assert time.process_time() - started < 10


# --------------------------------------------------------------------------------------------------
# tokenizer.json, trained here


def train_bpe(folder, pattern=QWEN, nfc=False, whole=False, pairs=True):
    """A folder with a byte-level BPE, and the Tokenizer that made it."""
    theirs = Tokenizer(models.BPE(ignore_merges=whole))
    theirs.normalizer = normalizers.NFC() if nfc else None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [r["instruction"] + r["output"] for r in RECORDS] * 3 + ["It's 2024, isn't it"] * 9
    theirs.train_from_iterator(texts + random_texts(200, seed=1), trainer)
    theirs.add_tokens(["<think>", "</think>"])
    spec = json.loads(theirs.to_str())
    if not pairs:
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    write(folder / "tokenizer.json", spec)
    write(folder / "tokenizer_config.json", {"bos_token": None, "eos_token": "<|im_end|>"})
    return theirs


FORMS = {
    "Qwen": {"nfc": True},
    "Llama-3": {"pattern": LLAMA3, "whole": True},
    "merges as texts": {"pairs": False},
    "another pattern": {"pattern": OTHER},
    "a pattern that leaves gaps": {"pattern": r"\p{L}+|\p{N}"},
}


@pytest.mark.parametrize("whole", [True, False])
def test_a_word_that_is_a_piece_needs_no_merges_with_ignore_merges(tmp_path, whole):
    """Llama-3's vocabulary has pieces that no merges make."""
    spec = json.loads(train_bpe(tmp_path, whole=whole).to_str())
    spec["model"]["vocab"]["zqx"] = 602
    write(tmp_path / "tokenizer.json", spec)
    ids = G.load_tokenizer(tmp_path).encode("zqx")
    assert ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("zqx").ids
    assert (ids == [602]) == whole


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_tokenizer_json_as_tokenizers_reads_it(form, tmp_path):
    theirs = train_bpe(tmp_path, **FORMS[form])
    ours = G.load_tokenizer(tmp_path)
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in random_texts(1500, seed=2) + [r["output"] for r in RECORDS]:
        ids = theirs.encode(text.replace("<|", "")).ids
        assert ours.encode(text.replace("<|", "")) == ids, ascii(text)
        # few words are pieces of so small a vocabulary: where they are cut is compared too
        text = unicodedata.normalize("NFC", text) if theirs.normalizer else text
        cut = [word for word, _ in theirs.pre_tokenizer.pre_tokenize_str(text)]
        assert [G.spell(w.encode()) for w in ours.pieces.words.split(text) if w] == cut
        assert ours.decode(ids) == theirs.decode(ids)
    # BOS where the post-processor puts it, and not where tokenizer_config.json alone names it
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write(tmp_path / "tokenizer_config.json", settings)
    assert G.load_tokenizer(tmp_path).encode("黄芪", bos=True) == theirs.encode("黄芪").ids
    theirs.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert G.load_tokenizer(tmp_path).encode("黄芪", bos=True) == theirs.encode("黄芪").ids
    draw = random.Random(0)
    for _ in range(200):  # halves of characters, special ids, ids shown
        ids = [draw.randrange(ours.vocab_size) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids)


def test_what_stands_in_front_of_a_text(tmp_path):
    """As many tokens as the post-processor says (GLM-4 has two), whichever the settings name; these
    may name a token by an object, as DeepSeek-R1-Distill-Qwen's do."""
    theirs = train_bpe(tmp_path)
    theirs.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|im_start|> <|endoftext|> $A",
                special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
            ),
        ]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    token = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "special": True}
    write(tmp_path / "tokenizer_config.json", {"bos_token": token, "eos_token": token})
    ours = G.load_tokenizer(tmp_path)
    assert (
        ours.encode("黄芪", bos=True) == theirs.encode("黄芪").ids == [1, 0, *ours.encode("黄芪")]
    )
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def test_glm_4_as_published_has_two_tokens_in_front(tmp_path):
    """tiktoken's file, and what THUDM's tokenization_chatglm.py puts before every text."""
    lines = [b64encode(bytes([byte])).decode() + f" {byte}\n" for byte in range(256)]
    write(tmp_path / "tokenizer.model", "".join(lines))
    write(tmp_path / "config.json", {"model_type": "chatglm"})
    ours = G.load_tokenizer(tmp_path)
    assert ours.special["[gMASK]"] == 258 and ours.special["<sop>"] == 260
    assert ours.encode("a", bos=True, eos=True) == [258, 260, ord("a"), 256]


def test_special_tokens_are_ids_and_never_text(tmp_path):
    theirs = train_bpe(tmp_path)
    ours = G.load_tokenizer(tmp_path)
    text = "a<|im_end|>b<think>"
    ids = ours.encode(text)
    assert theirs.encode(text).ids != ids and not {*ids} & {*ours.special.values()}
    assert ours.decode(ids) == text == theirs.decode(ids)
    assert ours.special == {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<think>": 600,
        "</think>": 601,
    }
    # thoughts are shown, as transformers shows them; ids of rows behind the vocabulary are nothing
    assert ours.decode([1, 600, *ours.encode("中"), 601, 2, 602, 9999]) == "<think>中</think>"
    # a base that was saved again names them once more; a piece may be an added token as well
    write(tmp_path / "added_tokens.json", {"<think>": 600, "<|im_end|>": 2, "[PAD]": 602})
    again = G.load_tokenizer(tmp_path)
    assert again.vocab_size == 603 and again.decode([600, 602, 2]) == "<think>"
    (tmp_path / "added_tokens.json").unlink()
    theirs.add_tokens(["的功效是"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    again = G.load_tokenizer(tmp_path)
    assert again.decode(again.encode("的功效是")) == "的功效是"
    # with ignore_merges a special token is no word either
    theirs.add_special_tokens(["PAD"])
    spec = json.loads(theirs.to_str())
    spec["model"]["ignore_merges"] = True
    pad = spec["model"]["vocab"]["PAD"] = theirs.token_to_id("PAD")
    write(tmp_path / "tokenizer.json", spec)
    assert pad not in G.load_tokenizer(tmp_path).encode("PAD")


def test_half_a_character_is_never_shown(tmp_path):
    """Any ids, streamed one by one: what is shown is never taken back, and holds no U+FFFD but what
    is one in the whole text."""
    train_bpe(tmp_path)
    tokenizer, draw = G.load_tokenizer(tmp_path), random.Random(0)
    for text in random_texts(100, seed=3):
        assert "".join(shown := streamed(tokenizer, tokenizer.encode(text))) == text
        assert not any("\ufffd" in piece for piece in shown)
    for _ in range(100):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids).rstrip("\ufffd")


def streamed(tokenizer, ids):
    """The pieces that stream yields of an answer that grows by these ids."""
    request, left = G.Request([0], G.Decoding()), list(ids)

    def step():
        if left:
            request.ids = [*request.ids, left.pop(0)]
        request.finish_reason = None if left else "stop"

    return list(G.stream(tokenizer, request, step))


def test_training_and_answering_with_a_tokenizer_json(tmp_path):
    """The rows that training makes, and run.json's hashes of the files that the ids hang on."""
    train_bpe(tmp_path)
    tokenizer, template = G.load_tokenizer(tmp_path), G.load_template("med_template")
    model = M.LLaMA(make_config(vocab_size=tokenizer.vocab_size + 10))
    M.save_model(model, tmp_path)
    assert G.load_base(tmp_path, "cpu", M.DTYPES["fp32"])[1].vocab_size == tokenizer.vocab_size
    for record in RECORDS:
        row = T.encode_example(tokenizer, template, record, T.TrainConfig())
        prompt = plain_prompt(template, record["instruction"])
        answer = [*tokenizer.encode(record["output"]), tokenizer.eos_id]
        assert row.ids == tokenizer.encode(prompt) + answer
        assert row.mask.count(True) == len(answer)
    config = T.TrainConfig(base_model=str(tmp_path), data_path=(), val_path="")
    before = T.describe_run(config)["sha256"]["base"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write(tmp_path / name, (tmp_path / name).read_text(encoding="utf-8") + " ")
        after = T.describe_run(config)["sha256"]["base"]
        assert after != before
        before = after


# --------------------------------------------------------------------------------------------------
# SentencePiece


def train_sentencepiece(folder, name="tokenizer.model", **more):
    out = BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    texts = [r["instruction"] + "\n" + r["output"] for r in RECORDS] + ["a b, c! It is"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, **(settings | more)
    )
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("newline", [True, False])
def test_answers_follow_prompts_whether_a_line_end_is_a_piece_or_a_byte(tmp_path, newline, prefix):
    """InternLM's and Baichuan's have a piece for "\\n", LLaMA's a byte."""
    symbols = {"user_defined_symbols": ["\n"]} if newline else {}
    train_sentencepiece(tmp_path, add_dummy_prefix=prefix, **symbols)
    tokenizer = G.load_tokenizer(tmp_path)
    assert tokenizer.pieces.piece_to_id("\n") != 0 or not newline
    prompt = "下面是\n### 回答:\n"
    for answer in ("黄芪的功效是", " a b", "It is\n\nso", "癫痫", "", "\n"):
        joint = tokenizer.encode(prompt + answer, bos=True)
        assert tokenizer.encode(prompt, bos=True) + tokenizer.encode_answer(answer) == joint


def test_chatglm_has_tokens_behind_its_pieces(tmp_path):
    """THUDM's tokenization_chatglm.py: five tokens behind the pieces, then ChatGLM3's roles; every
    prompt begins with [gMASK] sop, every text with its own space."""
    pieces = train_sentencepiece(tmp_path)
    write(tmp_path / "config.json", {"model_type": "chatglm"})
    tokenizer, size = G.load_tokenizer(tmp_path), len(pieces)
    names = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"
    for i, name in enumerate(names.split()):
        assert tokenizer.special[name] == size + i
    assert tokenizer.vocab_size == size + 9 and tokenizer.eos_id == 2
    text = "黄芪\n的功效[gMASK]<|user|>"
    assert tokenizer.encode(text, bos=True) == [size + 1, size + 3, *pieces.encode(text)]
    assert tokenizer.encode_answer(text) == pieces.encode(text)
    assert tokenizer.decode([size + 1, size + 3, *pieces.encode(text), 2, size + 6]) == text


CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]


@pytest.fixture(scope="module")
def ice(tmp_path_factory):
    """Folders with ChatGLM-6B's tokenizer in small: the old file of text pieces alone, and the new
    one with all pieces, written with Google's protobuf from what BASES says of it."""
    folder = tmp_path_factory.mktemp("ice")
    train_sentencepiece(
        folder / "old",
        "ice_text.model",
        byte_fallback=False,
        character_coverage=1.0,
        vocab_size=140,
        user_defined_symbols=["<pad>", "<n>"],
        normalization_rule_name="nmt_nfkc",
    )
    model = protobuf.ModelProto()
    model.ParseFromString((folder / "old" / "ice_text.model").read_bytes())
    added = [(name, 3) for name in CONTROL] + [("<|tab|>", 4)]
    added += [(f"<|blank_{n}|>", 4) for n in range(2, 81)]
    added += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    for text, kind in added:
        model.pieces.add(piece=text, score=0.0, type=kind)
    model.trainer_spec.byte_fallback = True
    (folder / "new").mkdir()
    (folder / "new" / "ice_text.model").write_bytes(model.SerializeToString())
    for name in ("old", "new"):
        write(folder / name / "config.json", {"model_type": "chatglm"})
    return folder


def published(pieces, text):
    """ChatGLM-6B's TextTokenizer and SPTokenizer: what they do to a text before SentencePiece."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for n in range(80, 1, -1):
        text = text.replace(" " * n, f"<|blank_{n}|>")
    return pieces.encode(text)


TEXTS = [
    "黄芪的功效是，补气！",
    "def main():\n    print('hello world')\t# greeting",
    "你好👋！我是",
    "a" + " " * 81 + "b" + " " * 163 + "c  d",
    "\n\n a\t\t",
]


@pytest.mark.parametrize("form", ["old", "new"])
def test_chatglm_6b_reads_both_forms_of_its_file(ice, form):
    tokenizer = G.load_tokenizer(ice / form)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(ice / "new" / "ice_text.model"))
    first = pieces.piece_to_id("[MASK]")
    assert [tokenizer.special[name] - first for name in CONTROL] == [*range(8)]
    # Med-ChatGLM's folder has ids of the vocabulary with image rows in added_tokens.json
    write(ice / form / "added_tokens.json", {"<eop>": 150005})
    assert G.load_tokenizer(ice / form).vocab_size == first + 344
    assert tokenizer.vocab_size == first + 344 and tokenizer.eos_id == first + 5
    for text in TEXTS:
        ids = published(pieces, text)
        assert tokenizer.encode(text, bos=True, eos=True) == [*ids, first + 5]
        assert tokenizer.encode_answer(text) == ids
    # the offsets of the published ids: [gMASK] 130001, sop 130004, eop 130005, tab 130008, four
    # blanks 130011, and 130328 130247 130233 130227 for the bytes of a waving hand
    ids = [i - first for i in tokenizer.encode("    \t👋") if i >= first]
    assert ids == [11, 8, 328, 247, 233, 227]


def test_chatglm_6b_decodes_blanks_and_chinese_marks(ice):
    tokenizer = G.load_tokenizer(ice / "old")
    for text, shown in [
        ("黄芪的功效是，补气！", "黄芪的功效是，补气！"),
        ("a, b! 黄芪: c:黄芪", "a, b! 黄芪： c：黄芪"),
        (TEXTS[1], TEXTS[1]),
        (TEXTS[3], TEXTS[3]),
        ("你好👋！我是", "你好👋！我是"),
    ]:
        ids = tokenizer.encode(text, eos=True)
        assert tokenizer.decode(ids) == shown
        # a mark at the end waits for what follows
        assert "".join(streamed(tokenizer, ids)) == shown
    assert streamed(tokenizer, tokenizer.encode("It is!"))[-1] == "!"


# --------------------------------------------------------------------------------------------------
# What is refused


def test_tokenizers_of_other_kinds_are_refused_in_one_line(tmp_path):
    train_bpe(tmp_path / "good")
    good = json.loads((tmp_path / "good" / "tokenizer.json").read_text(encoding="utf-8"))
    settings = tmp_path / "good" / "tokenizer_config.json"
    unigram = Tokenizer(models.Unigram([("a", -1.0)], 0))
    word = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    llama = Tokenizer(models.BPE({"<0x00>": 0}, [], byte_fallback=True))
    llama.pre_tokenizer = pre_tokenizers.Metaspace()
    split, level = good["pre_tokenizer"]["pretokenizers"]

    def words(pattern):
        return split | {"pattern": {"Regex": pattern}}

    for name, spec in {
        "unigram": json.loads(unigram.to_str()),
        "wordpiece": json.loads(word.to_str()),
        "llama": json.loads(llama.to_str()),
        "pattern": good | {"pre_tokenizer": {"pretokenizers": [level]}},
        "categories": good | {"pre_tokenizer": {"pretokenizers": [words(r"\p{Lu}+"), level]}},
        "groups": good | {"pre_tokenizer": {"pretokenizers": [words(r"(a)|b"), level]}},
        "merges": good | {"model": good["model"] | {"merges": [["a", "\u9ec4"]]}},
        "no letters": good | {"model": {"vocab": {}, "merges": []}},
        "no pairs": good | {"model": {"vocab": {}, "merges": [1]}},
        "lowercase": good | {"normalizer": {"type": "Lowercase"}},
        "damaged": '{"model"',
        "list": [],
        "tokens": good | {"added_tokens": [{"id": 3}]},
    }.items():
        write(tmp_path / name / "tokenizer.json", spec)
        shutil.copy(settings, tmp_path / name)
        with pytest.raises(ValueError, match="tokenizer.json") as error:
            G.load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value), name
    # a tokenizer.model beside it is preferred
    pieces = train_sentencepiece(tmp_path / "llama")
    assert G.load_tokenizer(tmp_path / "llama").encode("黄芪") == pieces.encode("黄芪")
    # no EOS named
    write(tmp_path / "good" / "tokenizer_config.json", {})
    with pytest.raises(ValueError, match="eos_token"):
        G.load_tokenizer(tmp_path / "good")


@pytest.mark.parametrize("content", [b"\x00\x01", b"", b"IQ== 0\nIg", b"IQ== x\n"])
def test_a_damaged_tokenizer_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model") as error:
        G.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "ice_text.model"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    write(tmp_path / name, POINTER)
    with pytest.raises(ValueError, match=rf"{name}.*git lfs pull"):
        G.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_place_of_weights_is_called_one(tmp_path, base, name):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    write(tmp_path / "base" / name, POINTER)
    with pytest.raises(ValueError, match=rf"{name}.*git lfs pull"):
        M.load_model(tmp_path / "base")


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.model.*tokenizer\.json"):
        G.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# Copies


def test_all_files_of_a_tokenizer_are_copied(tmp_path):
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ]
    for name in names:
        write(tmp_path / "base" / name, "{}")
    (tmp_path / "out").mkdir()
    M.copy_tokenizer(tmp_path / "base", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names}
    write(tmp_path / "ice" / "ice_text.model", "x")
    M.copy_tokenizer(tmp_path / "ice", tmp_path / "out")
    assert (tmp_path / "out" / "ice_text.model").read_text() == "x"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, name):
    write(tmp_path / "secret", "{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=rf"{name}.*link"):
        M.copy_tokenizer(tmp_path / "base", tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def test_the_hubs_cache_is_links_to_blobs(tmp_path, monkeypatch):
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "main"
    train_bpe(repo / "blobs")
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert G.load_tokenizer(M.find_base("a/b")).vocab_size == 602
    (tmp_path / "out").mkdir()
    M.copy_tokenizer(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("own", [True, False])
def test_an_exported_tokenizer_gives_transformers_the_same_ids(tmp_path, own):
    """data/tiny's puts no space in front, which transformers must be told: 500 prompts."""
    base = G.DATA / "tiny"
    if not own:  # a base that says nothing about it
        base = tmp_path / "base"
        base.mkdir()
        shutil.copy(G.DATA / "tiny" / "tokenizer.model", base)
    (tmp_path / "out").mkdir()
    M.copy_tokenizer(base, tmp_path / "out")
    ours, template = G.load_tokenizer(base), G.load_template("med_template")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    records = G.read_instructions(G.DATA / "train.jsonl")[:500]
    prompts = [plain_prompt(template, record["instruction"]) for record in records]
    assert len(prompts) == 500
    for prompt in prompts:
        assert theirs(prompt).input_ids == ours.encode(prompt, bos=True)
