"""The decoding engine: transformers' tokens in every deterministic mode, exact distributions in every sampled one, and
answers that do not depend on their company in the batch."""
import random

import pytest
import torch
from conftest import make_config

import generate as G
import model as M
from test_model import to_transformers

EOS = 2


def peaked_model(seed, n_kv_heads=2):
    """Random weights large enough that answers vary and EOS comes by itself now and then."""
    model = M.LLaMA(make_config(n_kv_heads, vocab_size=60))
    M.init_weights(model, seed)
    for p in model.parameters():
        p.data *= 6 if p.dim() == 2 else 1
    model.output.weight.data[EOS] *= 1.5
    return model.eval()


def prompts(count, seed, shortest=1, longest=40):
    draw = random.Random(seed)
    return [[1] + [draw.randrange(3, 60) for _ in range(draw.randrange(shortest, longest) - 1)] for _ in range(count)]


def answer_all(model, asked, rows, max_len=80, eos_id=EOS, **more):
    """Run the requests through one batch of so many rows, refilled as they end, in their order."""
    batch, waiting = G.Batch(model, None, rows, max_len, eos_id, **more), list(asked)[::-1]
    while waiting or batch.owner:
        while waiting and waiting[-1].decoding.num_beams <= batch.free:
            batch.add(waiting.pop())
        batch.step()
    assert batch.free == rows
    return asked


def theirs(hf, ids, decoding, eos_id=EOS):
    """transformers' answer, without its EOS, and whether that came."""
    out = hf.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                      max_new_tokens=decoding.max_new_tokens, num_beams=decoding.num_beams, length_penalty=decoding.length_penalty,
                      repetition_penalty=decoding.repetition_penalty, pad_token_id=0, eos_token_id=eos_id,
                      no_repeat_ngram_size=decoding.no_repeat_ngram_size, temperature=None, top_p=None, top_k=None)
    new = out[0, len(ids):].tolist()
    return (new[:-1], "stop") if new[-1] == eos_id else (new, "length")


MODES = {"greedy": {}, "beams": {"num_beams": 4}, "beams_long": {"num_beams": 4, "length_penalty": 2.0},
         "beams_short": {"num_beams": 3, "length_penalty": -0.5}, "beams_sum": {"num_beams": 4, "length_penalty": 0.0},
         "repetition": {"repetition_penalty": 1.3}, "ngram": {"no_repeat_ngram_size": 2},
         "both": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}, "beams_ngram": {"num_beams": 4, "no_repeat_ngram_size": 2,
                                                                                         "repetition_penalty": 1.2}}


def compare(mode, count, seed):
    model = peaked_model(seed)
    hf = to_transformers(model)
    draw = random.Random(seed + 1)
    asked = [G.Request(ids, G.Decoding(max_new_tokens=draw.randrange(1, 30), **MODES[mode])) for ids in prompts(count, seed)]
    answer_all(model, asked, rows=9)
    for request in asked:
        assert (request.ids, request.finish_reason) == theirs(hf, request.prompt_ids, request.decoding), request.prompt_ids
    return {reason: sum(r.finish_reason == reason for r in asked) for reason in ("stop", "length")}


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_gives_transformers_tokens(mode):
    """Unequal prompts in one refilled batch, against transformers' generate one by one, float32."""
    ended = compare(mode, 8, seed=3)
    assert ended["stop"] and ended["length"]                      # both ways to end were met


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_prompts_give_transformers_tokens(mode):
    for seed in range(4):
        compare(mode, 50, seed=10 + seed)
