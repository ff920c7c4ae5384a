"""A small base written by the tests: weights by formula, a tokenizer with byte fallback, eight
records."""

import json
import os
import sys
from io import BytesIO
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two workers on two cores; torch reads it when imported

import pytest
import sentencepiece
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402

RECORDS = [
    {
        "instruction": f"{name}有什么功效？",
        "input": "",
        "output": f"{name}的功效是{effect}。",
        "values": [effect],
    }
    for name, effect in [
        ("黄芪", "补气升阳"),
        ("柴胡", "疏散退热"),
        ("麻黄", "发汗解表"),
        ("桂枝", "温通经脉"),
        ("当归", "补血活血"),
        ("甘草", "调和诸药"),
        ("大黄", "泻下攻积"),
        ("附子", "回阳救逆，补火助阳，散寒止痛"),
    ]
]


def formula_weights(model):
    """Weights by formula, so that no golden number hangs on a random generator."""
    for i, p in enumerate(model.parameters()):
        n = torch.arange(p.numel(), dtype=torch.float64)
        wave = torch.sin(n * (0.7 + 0.01 * i) + i) * 0.25
        p.data.copy_(((1 + wave) if p.dim() == 1 else wave).view(p.shape).to(p.dtype))
    return model


def make_config(n_kv_heads=2, vocab_size=300, **more):
    return M.LLaMAConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": vocab_size,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": n_kv_heads,
            "intermediate_size": 96,
            **more,
        }
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A complete base folder: config.json, model.safetensors, tokenizer.model."""
    folder = tmp_path_factory.mktemp("base")
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["有什么功效", "的功效是", "下面是一个问题"] * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).get_piece_size()
    model = M.LLaMA(make_config(vocab_size=size))
    M.init_weights(model, 0)
    M.save_model(model, folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS), encoding="utf-8"
    )
    return path


def run_command(main, *argv):
    """Run a script's main() with a command line, in this process; its exit code."""
    old, sys.argv = sys.argv, [f"{main.__module__}.py", *map(str, argv)]
    try:
        M.run(main)
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = old
    return 0


def plain_prompt(template, instruction, input=""):
    """The text of a prompt as BenTsao's own code makes it."""
    key = "prompt_input" if input else "prompt_no_input"
    return template[key].format(instruction=instruction, input=input)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """{kind: folder} of small tokenizers, for every kind of base."""
    import small_bases  # which imports what stands here

    return small_bases.small_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The same of the real vocabularies that are installed."""
    import small_bases

    return small_bases.real_tokenizers(tmp_path_factory.mktemp("tokenizers"))
