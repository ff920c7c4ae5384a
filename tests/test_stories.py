"""A real trained LLaMA, karpathy's stories260K: its greedy text, 200 tokens from BOS alone, is the
one that llama2.c publishes, whatever the folder's layout and the dtype.

The weights are no part of this repository: shared/data/stories260K beside it has them, a script
that writes them as Meta's folder, and the text."""

import subprocess
import sys

import generate as G

import pytest
import sentencepiece
import torch
from conftest import ROOT
from transformers import LlamaForCausalLM

STORIES = ROOT.parent / "shared/data/stories260K"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{layout: folder} of the same weights: Meta's, and what model.py converts it to."""
    at = tmp_path_factory.mktemp("stories")
    for command in (
        [STORIES / "convert.py", at / "meta"],
        [ROOT / "model.py", "convert", at / "meta", at / "hf"],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {"meta": at / "meta", "hf": at / "hf"}


@pytest.fixture(scope="module")
def story():
    text = (STORIES / "text.txt").read_text(encoding="utf-8")
    assert len(text) == 464
    return text


@pytest.mark.parametrize(
    "dtype, base_dtype", [("fp32", "auto"), ("bf16", "auto"), ("fp32", "int8")]
)
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_greedy_text_is_llama2_cs(folders, story, layout, dtype, base_dtype):
    model, tokenizer = G.load_base(folders[layout], "cpu", G.DTYPES[dtype], base_dtype)
    ids = list(G.generate_ids(model, [tokenizer.bos_id], 200, tokenizer.eos_id))
    assert len(ids) == 200
    assert tokenizer.decode(ids) == story


def test_the_converted_folder_is_transformers_own(folders, story):
    """transformers and sentencepiece read it and write the same text."""
    model = LlamaForCausalLM.from_pretrained(folders["hf"], dtype=torch.float32).eval()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folders["hf"] / "tokenizer.model"))
    prompt = torch.tensor([[pieces.bos_id()]])
    made = model.generate(prompt, max_new_tokens=200, do_sample=False)[0].tolist()
    assert len(made) == 201
    assert pieces.decode(made) == story
