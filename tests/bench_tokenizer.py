"""Encoding times of BenTsao's records, beside tiktoken and tokenizers, as ratios.

  python tests/bench_tokenizer.py RECORDS [RUNS]

RECORDS is BenTsao's llama_data.json, or any file of records. The real vocabularies of Qwen and
Llama-3 come from two packages of which nothing is imported (pip install tiktoken; pip install
--no-deps dashscope==2.0.2 llama-models==0.3.0). Each run of ours begins with an empty cache of
words. CPU seconds of one thread, the least of RUNS (3).
"""

import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"], os.environ["TIKTOKEN_CACHE_DIR"] = "false", ""

import tiktoken  # noqa: E402
from tiktoken.load import load_tiktoken_bpe  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import generate as G  # noqa: E402

VOCABULARIES = {
    "Llama-3": ("llama_models", "llama3/tokenizer.model", G.WORDS),
    "Qwen": ("dashscope", "resources/qwen.tiktoken", G.WORDS.replace("{1,3}", "")),
}


def least(runs, *calls):
    """The least CPU seconds of each call, taken in turns, and what each returned at last."""
    times, made = [[] for _ in calls], [None] * len(calls)
    for _ in range(runs):
        for i, call in enumerate(calls):
            started = time.process_time()
            made[i] = call()
            times[i].append(time.process_time() - started)
    return [*map(min, times)], made


def measure(name, texts, runs):
    package, file, pattern = VOCABULARIES[name]
    source = str(Path(find_spec(package).submodule_search_locations[0], file))
    ranks = load_tiktoken_bpe(source)
    openai = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    with tempfile.TemporaryDirectory() as folder:
        file, settings = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
        TikTokenConverter(source, pattern, extra_special_tokens=["<end>"]).converted().save(
            str(file)
        )
        settings.write_text(json.dumps({"eos_token": "<end>"}))
        (load, theirs), (ours, hub) = least(
            runs, lambda: G.load_tokenizer(folder), lambda: Tokenizer.from_file(str(file))
        )

    def encode():
        ours.pieces.merged.cache_clear()
        return [ours.encode(text) for text in texts]

    (cold, warm, fast, fastest), (ids, again, same, too) = least(
        runs,
        encode,
        lambda: [ours.encode(text) for text in texts],
        lambda: [hub.encode(text).ids for text in texts],
        lambda: [openai.encode_ordinary(text) for text in texts],
    )
    assert ids == again == same == too
    count, characters = sum(map(len, ids)), sum(map(len, texts))
    print(f"{name}: {len(texts):,} records, {count:,} tokens, {count / characters:.2f} a character")
    print(f"  load    {load:6.2f} s   tokenizers {theirs:6.2f} s ({load / theirs:.1f} times)")
    for what, ours in (("encode", cold), ("again", warm)):
        print(
            f"  {what:7} {ours:6.2f} s   tokenizers {fast:6.2f} s ({ours / fast:.1f} times)   "
            f"tiktoken {fastest:6.2f} s ({ours / fastest:.1f} times)"
        )


def main():
    records = G.read_instructions(sys.argv[1], answers=True)
    texts = [record["instruction"] + "\n" + record["output"] for record in records]
    for name in VOCABULARIES:
        measure(name, texts, int([*sys.argv, 3][2]))


if __name__ == "__main__":
    main()
