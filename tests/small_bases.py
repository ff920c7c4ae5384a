"""Small random bases of each kind in folders as they are published, with a tokenizer of the form
that each of them has; and their real vocabularies, where the packages that hold them are installed:
pip install --no-deps dashscope==2.0.2 llama-models==0.3.0 (and tiktoken)."""

import json
import shutil

import generate as G

import numpy as np
import test_bases
import test_chatglm6b
import test_templates
import tokenizers
import torch
import transformers
from numpy_glm import CHATGLM3, random_chatglm3, write_bins
from sentencepiece import SentencePieceProcessor
from test_quantise import PAPER
from test_tokenizers import LLAMA3, QWEN, real_vocabulary
from transformers.convert_slow_tokenizer import TikTokenConverter

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# name: (one of test_bases.BASES, the tokenizer of its kind); None: not in transformers
KINDS = {
    "qwen2": ("qwen2", "qwen2_5"),
    "qwen3": ("qwen3", "qwen"),
    "llama3": ("llama-3.1", "llama3"),
    "mistral": ("mistral", "mistral"),
    "glm4": ("glm-4-9b", "glm4"),
    "chatglm3": (None, "glm"),
    "chatglm6b": (None, "ice"),
}
IN_TRANSFORMERS = [name for name, (base, _) in KINDS.items() if base]


def small_tokenizers(top):
    """{kind: folder} of small tokenizers, trained here."""
    byte_level, pieces = test_templates.byte_level, test_templates.sentence_pieces
    made = {
        "qwen2_5": byte_level(top / "qwen2_5", test_templates.QWEN[:3]),
        "qwen": byte_level(top / "qwen", test_templates.QWEN),
        "llama3": byte_level(top / "llama3", test_templates.LLAMA, "<|begin_of_text|>"),
        "glm4": byte_level(top / "glm4", test_templates.GLM4),
        "mistral": pieces(top / "mistral", ["[INST]", "[/INST]"]),
        "glm": pieces(top / "glm", config={"model_type": "chatglm"}),
        "ice": test_templates.ice_text(top / "ice"),
    }
    put_in_front(made["glm4"] / "tokenizer.json", ["[gMASK]", "<sop>"])  # as GLM-4-9B's has it
    add_tokenizer_json(made["mistral"])
    return made


def add_tokenizer_json(folder):
    """Beside a tokenizer.model the tokenizer.json that LLaMA's and Mistral's folders have too: it
    is what transformers reads, and a blank and <s> in front stand there as SentencePiece has it.
    Transformers 5 merges blanks first there, whose score is the lowest: by score they come last."""
    transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    normalizers = [{"type": "Prepend", "prepend": "▁"}]
    normalizers += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    spec["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    spec["pre_tokenizer"] = None
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    score = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(len(pieces))}
    spec["model"]["merges"].sort(key=lambda pair: -score["".join(pair)])
    file.write_text(json.dumps(spec), encoding="utf-8")
    put_in_front(file, ["<s>"])


def put_in_front(file, names):
    """Have a tokenizer.json put special tokens in front of every text."""
    tokenizer, processors = tokenizers.Tokenizer.from_file(str(file)), tokenizers.processors
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    template = processors.TemplateProcessing(" ".join([*names, "$A"]), None, ids)
    level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([level, template])
    tokenizer.save(str(file))


def real_tokenizers(top):
    """The same of Qwen's and Llama-3's real vocabularies, with the settings that their
    tokenizer_config.json has; a test is skipped where they are not installed."""
    qwen = test_templates.QWEN
    made = {
        "qwen2_5": (QWEN, qwen[:3], "<|im_end|>", "Qwen2Tokenizer"),
        "qwen": (QWEN, qwen[:3], "<|im_end|>", "Qwen2Tokenizer"),
        "llama3": (LLAMA3, G.BEHIND["llama"].split(), "<|eot_id|>", "PreTrainedTokenizerFast"),
    }
    for kind, (pattern, special, end, its_class) in made.items():
        package, file = ("dashscope", "resources/qwen.tiktoken")
        if kind == "llama3":
            package, file = ("llama_models", "llama3/tokenizer.model")
        source = str(real_vocabulary(package, file))
        tokenizer = TikTokenConverter(source, pattern, extra_special_tokens=special).converted()
        settings = {"tokenizer_class": its_class, "eos_token": end, "bos_token": None}
        if kind == "qwen":
            tokenizer.add_tokens(
                [tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>")]
            )
        if kind != "llama3":  # as Qwen's own tokenizer.json has it
            tokenizer.normalizer = tokenizers.normalizers.NFC()
            tokenizer.model.ignore_merges = False
        (top / kind).mkdir(parents=True)
        tokenizer.save(str(top / kind / "tokenizer.json"))
        if kind == "llama3":
            settings["bos_token"] = special[0]
            put_in_front(top / kind / "tokenizer.json", special[:1])
        (top / kind / "tokenizer_config.json").write_text(json.dumps(settings))
    return {kind: top / kind for kind in made}


def write_base(folder, name, tokenizer):
    """A random base in a folder with a tokenizer's files; its weights by their names in files.
    They are large enough that a wrong row, bias or angle is seen."""
    base, _ = KINDS[name]
    rows = G.load_tokenizer(tokenizer).vocab_size + 3
    torch.manual_seed(0)
    if base:
        config, more = test_bases.BASES[base]
        more = {**test_bases.SHAPE, **more, **SHAPE, "vocab_size": rows}
        hf = transformers.AutoModelForCausalLM.from_config(config(**more))
        for key, p in hf.named_parameters():
            p.data.normal_("norm" in key, 0.2 if p.dim() > 1 else 0.4)
        hf.save_pretrained(folder)
        state = hf.state_dict()
    elif name == "chatglm3":
        config = CHATGLM3 | {"padded_vocab_size": rows, "ffn_hidden_size": 128}
        state = random_chatglm3(config)
        write_bins(folder, config, state, 3)
    else:
        state = test_chatglm6b.release(rows=rows)
        test_chatglm6b.write_release(folder, state, vocab_size=rows)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    for file in tokenizer.glob("ice_text.model"):
        shutil.copy(file, folder)
    return state


def stored(weight, kind):
    """A weight (O, I) as a base of 8 or 4 bits holds it, in float32, by the definitions."""
    w = weight.numpy()
    if kind == "int8":
        scale = torch.from_numpy(np.abs(w).max(1) / np.float32(127)).bfloat16().float().numpy()
        return torch.from_numpy(np.rint(w / scale[:, None]) * scale[:, None])
    if kind == "nf4":
        blocks = w.reshape(-1, 64)
        greatest = np.abs(blocks).max(1, keepdims=True)
        nearest = np.abs((blocks / greatest)[..., None] - PAPER).argmin(-1)
        return torch.from_numpy((PAPER[nearest] * greatest).reshape(w.shape))
    return weight
