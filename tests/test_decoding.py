"""The decoding engine: transformers' tokens in every deterministic mode, exact distributions in
every sampled one, and answers that do not depend on their company in the batch."""

import json
import random
import subprocess
import sys
import time

import generate as G
import model as M
from lora import QUANTISED, LoRAConfig, add_lora, lora_linears, merge, quantize, save_adapter

import pytest
import torch
from conftest import ROOT, make_config
from test_model import to_transformers

EOS = 2


def peaked_model(seed, n_kv_heads=2):
    """Random weights large enough that answers vary and EOS comes by itself now and then."""
    model = M.LLaMA(make_config(n_kv_heads, vocab_size=60))
    M.init_weights(model, seed)
    for p in model.parameters():
        p.data *= 6 if p.dim() == 2 else 1
    model.lm_head.weight.data[EOS] *= 1.5
    return model.eval()


def prompts(count, seed, shortest=1, longest=40):
    draw = random.Random(seed)
    return [
        [1] + [draw.randrange(3, 60) for _ in range(draw.randrange(shortest, longest) - 1)]
        for _ in range(count)
    ]


class Letters:
    """A tokenizer of one character an id, for stop texts."""

    unsettled = "\ufffd"
    leading = ""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def answer_all(model, asked, rows, positions=80, eos_id=EOS, **more):
    """Run the requests through one batch of so many rows, refilled as they end, in their order."""
    batch = G.Batch(model, rows, positions, eos_id, Letters().decode, **more)
    for request in asked:
        batch.submit(request)
    while batch.waiting or batch.rows:
        batch.step()
    return asked


def theirs(hf, ids, decoding, eos_id=EOS):
    """transformers' answer, without its EOS, and whether that or one of the stop texts, here of one
    `Letters` id, came."""

    def ends(ids, scores, **more):
        return torch.tensor([Letters().decode(row[-1:].tolist()) in decoding.stop for row in ids])

    out = hf.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        repetition_penalty=decoding.repetition_penalty,
        pad_token_id=0,
        eos_token_id=eos_id,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        temperature=None,
        top_p=None,
        top_k=None,
        stopping_criteria=[ends] if decoding.stop else None,
    )
    new = out[0, len(ids) :].tolist()
    if new[-1] == eos_id:
        return new[:-1], "stop"
    return new, "stop" if ends([torch.tensor(new)], None)[0] else "length"


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams_long": {"num_beams": 4, "length_penalty": 2.0},
    "beams_short": {"num_beams": 3, "length_penalty": -0.5},
    "beams_sum": {"num_beams": 4, "length_penalty": 0.0},
    "repetition": {"repetition_penalty": 1.3},
    "ngram": {"no_repeat_ngram_size": 2},
    "both": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
    "beams_ngram": {"num_beams": 4, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    "stops": {"num_beams": 4, "stop": tuple("bf")},
    "stops_many": {"num_beams": 4, "stop": tuple("dgkprsx")},
    "stops_most": {"num_beams": 3, "stop": tuple("bdfghkmprstvxz"), "length_penalty": -3.0},
    "stops_long": {"num_beams": 5, "stop": tuple("cdhmnpqst"), "length_penalty": 10.0},
}


def compare(mode, count, seed):
    model = peaked_model(seed)
    hf = to_transformers(model)
    draw = random.Random(seed + 1)
    asked = [
        G.Request(ids, G.Decoding(max_new_tokens=draw.randrange(1, 30), **MODES[mode]))
        for ids in prompts(count, seed)
    ]
    answer_all(model, asked, rows=9)
    for request in asked:
        assert (request.ids, request.finish_reason) == theirs(
            hf, request.prompt_ids, request.decoding
        ), request.prompt_ids
    return {reason: sum(r.finish_reason == reason for r in asked) for reason in ("stop", "length")}


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_gives_transformers_tokens(mode):
    """Unequal prompts in one refilled batch, against transformers' generate one by one, float32."""
    ended = compare(mode, 8, seed=7)
    # both ways to end were met
    assert ended["stop"] and ended["length"] or mode.startswith("stops")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_prompts_give_transformers_tokens(mode):
    for seed in range(4):
        compare(mode, 50, seed=10 + seed)


@pytest.mark.parametrize("n_kv_heads", [4, 1])
def test_an_answer_does_not_depend_on_its_company(n_kv_heads, monkeypatch):
    """Greedy, sampled and beam requests mixed in one refilled batch, prompts cut into chunks of 7,
    one cancelled half way, one before it began: each answer is the one it has alone."""
    model = peaked_model(5, n_kv_heads)
    kinds = [
        {},
        {"temperature": 0.8, "seed": 1, "top_p": 0.9},
        {"num_beams": 3},
        {"temperature": 1.2, "seed": 2, "repetition_penalty": 1.2},
    ]

    def make():
        return [
            G.Request(ids, G.Decoding(4 + i % 17, **kinds[i % 4]))
            for i, ids in enumerate(prompts(16, 8))
        ]

    alone = [answer_all(model, [request], rows=3)[0] for request in make()]
    assert len({tuple(r.ids) for r in alone}) > 12
    monkeypatch.setattr(G, "PREFILL_CHUNK", 7)
    batch = G.Batch(model, 7, 80, EOS)
    long = next(
        ids for ids in prompts(20, 9) if len(list(G.generate_ids(model, ids, 9, eos_id=EOS))) == 9
    )
    quitter, late, together = G.Request(long, G.Decoding(40)), make()[0], make()
    for request in (quitter, *together, late):
        batch.submit(request)
    for step in range(1000):
        before = [len(request.ids) for request in together]
        batch.step()
        for request, count in zip(together, before):
            assert len(request.ids) - count <= 1 or request.decoding.num_beams > 1
        quitter.cancelled, late.cancelled = step >= 3, True
        if not batch.rows:
            break
    assert not batch.waiting and len(quitter.ids) == 4 and quitter.finish_reason is None
    assert not late.ids and late.finish_reason is None
    assert [(r.ids, r.finish_reason) for r in together] == [(r.ids, r.finish_reason) for r in alone]


def test_a_row_may_ask_the_base():
    """Rows of the base and rows of its adapter in one batch: each answer is its own model's."""
    model = peaked_model(5)

    def make(adapted):
        return [G.Request(p, G.Decoding(12), adapted) for p in prompts(6, 8)]

    base = answer_all(model, make(True), 3)
    add_lora(model, LoRAConfig(r=4, targets=("all",)))
    for i, (_, module) in enumerate(lora_linears(model)):
        module.lora_b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
    tuned = answer_all(model, make(True), 3)
    assert [r.ids for r in base] != [r.ids for r in tuned]
    mixed = [r for pair in zip(make(True), make(False)) for r in pair]
    answer_all(model, mixed, 4)
    assert [r.ids for r in mixed[::2]] == [r.ids for r in tuned]
    assert [r.ids for r in mixed[1::2]] == [r.ids for r in base]
    again = answer_all(model, make(True), 3)  # nothing of it stays behind
    assert [r.ids for r in again] == [r.ids for r in tuned]


def test_greedy_rows_wait_for_the_device_once(monkeypatch):
    """One argmax and one transfer for all of them."""
    count, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: count.append(1) or tolist(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("a wait of its own"))
    asked = answer_all(peaked_model(5), [G.Request(p, G.Decoding(5)) for p in prompts(6, 8)], 6)
    assert len(count) == max(len(r.ids) + (r.finish_reason == "stop") for r in asked)


def test_what_does_not_fit_is_said():
    batch = G.Batch(peaked_model(0), 2, 20, EOS)
    for prompt, decoding in (([1] * 15, {}), ([1], {"num_beams": 3}), ([], {})):
        with pytest.raises(ValueError, match=f"prompt of {len(prompt)} tokens.*2 rows of 20"):
            batch.submit(G.Request(prompt, G.Decoding(6, **decoding)))
    batch.step()
    assert not batch.waiting and not batch.rows


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -1),
        ("num_beams", 0),
        ("num_beams", True),
        ("length_penalty", float("inf")),
        ("length_penalty", 1e300),
        pytest.param("length_penalty", 10**400, id="huge"),
        ("seed", 0.5),
        ("stop", [""]),
        ("stop", [3]),
        ("temperature", 1e-40),
        ("temperature", 10**20),
        ("repetition_penalty", 10**20),
        ("repetition_penalty", 1e-300),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*wanted"):
        G.Decoding(**{name: value})


def test_beams_do_not_sample():
    with pytest.raises(ValueError, match="beam search does not sample"):
        G.Decoding(num_beams=2, temperature=0.5)


# Each filter alone and all together; the distribution is worked out in float64 from its definition
ALL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
FILTERS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    "penalty": {"repetition_penalty": 1.5, "temperature": 0.9},
    "ngram": {"no_repeat_ngram_size": 2, "top_k": 8},
}


def exact_distribution(logits, ids, d):
    x = [float(v) for v in logits]
    for i in set(ids):
        x[i] *= d.repetition_penalty if x[i] < 0 else 1 / d.repetition_penalty
    n, gone = d.no_repeat_ngram_size, set()
    if n:
        gone = {
            ids[i + n - 1]
            for i in range(len(ids) - n + 1)
            if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]
        }
    weight = {i: 2.718281828459045 ** (v / d.temperature) for i, v in enumerate(x) if i not in gone}
    order = sorted(weight, key=weight.get, reverse=True)[: d.top_k or None]
    total, mass, kept = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if mass < d.top_p:
            kept.append(i)
        mass += weight[i] / total
    kept = [i for i in kept if weight[i] >= d.min_p * weight[order[0]]]
    return {i: weight[i] / sum(weight[j] for j in kept) for i in kept}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_pass_a_chi_square_test(name):
    """6,000 draws against the exact distribution; the statistic stays under its 0.1 % point (Wilson
    and Hilferty), and what a filter excludes is never drawn."""
    decoding = G.Decoding(**ALL | FILTERS[name])
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 2
    ids, generator, count = [3, 7, 11, 7, 3, 20, 11, 7], torch.Generator().manual_seed(5), 6000
    exact = exact_distribution(logits, ids, decoding)
    left = G.penalise(logits, ids, decoding)
    draws = (
        torch.stack([G.sample(left, decoding, generator) for _ in range(count)])
        .bincount(minlength=40)
        .tolist()
    )
    assert all(n == 0 for i, n in enumerate(draws) if i not in exact) and 2 < len(exact) <= 40
    cells = [i for i in exact if exact[i] * count >= 5]
    rest = 1 - sum(exact[i] for i in cells)
    pairs = [(draws[i], exact[i] * count) for i in cells] + [
        (count - sum(draws[i] for i in cells), rest * count)
    ] * (rest * count > 1)
    statistic, freedom = (
        sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs),
        len(pairs) - 1,
    )
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_transformers_keeps(name):
    """The same support as transformers' processors and warpers in the order in which its generate
    applies them."""
    from transformers import generation as T

    decoding = G.Decoding(**ALL | FILTERS[name])
    ids = [3, 7, 11, 7, 3, 20, 11, 7]
    steps = [
        (
            decoding.repetition_penalty != 1,
            lambda: T.RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty),
        ),
        (
            decoding.no_repeat_ngram_size,
            lambda: T.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size),
        ),
        (decoding.temperature != 1, lambda: T.TemperatureLogitsWarper(decoding.temperature)),
        (decoding.top_k, lambda: T.TopKLogitsWarper(decoding.top_k)),
        (decoding.top_p < 1, lambda: T.TopPLogitsWarper(decoding.top_p)),
        (decoding.min_p, lambda: T.MinPLogitsWarper(decoding.min_p)),
    ]
    chain = [make() for wanted, make in steps if wanted]
    for seed in range(30):
        scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 2
        want = scores
        for f in chain:
            want = f(torch.tensor([ids]), want)
        exact = exact_distribution(scores[0], ids, decoding)
        assert {i for i in range(40) if want[0, i] > -torch.inf} == set(exact)
        assert all(abs(want.softmax(-1)[0, i] - p) < 1e-5 for i, p in exact.items())


def test_stop_texts_end_an_answer_and_are_never_shown():
    model, ids = peaked_model(5), [1, 30, 31]
    free, tokenizer = list(G.generate_ids(model, ids, 30)), Letters()
    whole = tokenizer.decode(free)
    for start, length in ((0, 1), (3, 2), (9, 4), (20, 3)):
        stop = whole[start : start + length]
        request = G.Request(ids, G.Decoding(30, stop=("nowhere", stop)))
        batch, shown = G.Batch(model, 1, 40, None, tokenizer.decode), ""
        batch.submit(request)
        for piece in G.stream(tokenizer, request, batch.step):
            shown += piece
            assert whole[: whole.index(stop)].startswith(shown)
        assert request.finish_reason == "stop"
        assert len(request.ids) == whole.index(stop) + length
        assert shown == whole[: whole.index(stop)]
    # held for a stop text that never came
    assert "".join(streamed(tokenizer, free, (whole[-1] + "?",))) == whole


def streamed(tokenizer, ids, stop=()):
    """The pieces in which ids are shown that come one by one."""
    request, left = G.Request([1], G.Decoding(stop=stop)), list(ids)

    def step():
        request.ids = request.ids + left[:1]
        del left[:1]
        request.finish_reason = None if left else "length"

    return list(G.stream(tokenizer, request, step))


def test_a_long_stop_text_costs_no_more_than_the_text_it_may_end():
    """Of 200,000 characters, a second for 100 ids; before, each id took a second and more."""
    started = time.monotonic()
    text = "".join(streamed(Letters(), [1, 2, *[0] * 97, 3], ("a" * 200000,)))
    assert text == "bc" + "a" * 97 + "d" and time.monotonic() - started < 1


def test_a_cache_that_memory_cannot_hold_is_said():
    with pytest.raises(ValueError, match="memory.*batch_size.*max_new_tokens"):
        next(G.generate_ids(peaked_model(0), [1], 2**24, num_beams=2**24))


def test_a_stream_shows_what_one_decode_gives(base):
    """Random ids, broken bytes among them: the pieces together are the whole text, and no piece
    ends inside a character."""
    tokenizer, draw = G.load_tokenizer(base), random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(draw.randrange(1, 40))]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids).rstrip("\ufffd")
        assert not any(p.endswith("\ufffd") for p in pieces)


def cached_logits(model, ids, compile=False):
    """Logits (T, V) of decoding one token after the other; compiled as --compile does it."""
    batch = G.Batch(model, 1, len(ids), compile=compile)
    with torch.inference_mode():
        rows = [batch.forward(torch.tensor([[i, at, 0]]), at).clone() for at, i in enumerate(ids)]
        return torch.cat(rows)


@pytest.mark.parametrize(
    "kind, compile",
    [("int8", False), ("nf4", False), pytest.param("int8", True, marks=pytest.mark.slow)],
)
def test_quantised_decoding_equals_its_dequantised_weights(kind, compile):
    """float32: the logits of a model whose weights are the dequantised ones, to rounding. bf16,
    where int8 has a product of its own: as near to the float32 logits as a bf16 model of the
    dequantised weights is, within a factor of two."""
    ids, quantised, plain = prompts(1, 3, 30)[0], {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        quantised[dtype] = quantize(peaked_model(7), kind, dtype=dtype)
        state = {}
        for name, module in quantised[dtype].named_modules():
            if isinstance(module, QUANTISED[kind]):  # W is what it makes of the unit vectors
                state[name + ".weight"] = module(torch.eye(module.in_features)).T
        plain[dtype] = peaked_model(7)
        assert len(state) == 14
        assert not plain[dtype].load_state_dict(state, strict=False).unexpected_keys
        plain[dtype].to(dtype)
    exact = cached_logits(plain[torch.float32], ids)

    def error(model, *how):
        return ((cached_logits(model, ids, *how) - exact).norm() / exact.norm()).item()

    assert error(quantised[torch.float32], compile) < 1e-5
    assert error(quantised[torch.bfloat16], compile) < max(0.02, 2 * error(plain[torch.bfloat16]))


def test_merged_answers_as_unmerged():
    """float32: logits within 1e-5 of each other and the same greedy tokens. bf16: merging rounds
    W + update to bf16, an error of the order of bf16's own, so logits stay within 0.04 of the
    float32 ones, merged or not."""
    ids, logits, answers = prompts(1, 3, 30)[0], {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        for merged in (False, True):
            model = peaked_model(7).to(dtype)
            add_lora(model, LoRAConfig(r=4, targets="all"))
            draw = torch.Generator().manual_seed(1)
            for _, module in lora_linears(model):
                module.lora_b.data.normal_(0, 0.02, generator=draw)
                module.lora_a.data.normal_(0, 0.2, generator=draw)
            if merged:
                merge(model)
            logits[dtype, merged] = cached_logits(model.eval(), ids)
            answers[dtype, merged] = list(G.generate_ids(model, ids, 20, eos_id=EOS))
    exact = logits[torch.float32, False]

    def far(key):
        return ((logits[key] - exact).norm() / exact.norm()).item()

    assert (
        0 < far((torch.float32, True)) < 1e-5
        and answers[torch.float32, True] == answers[torch.float32, False]
    )
    assert far((torch.bfloat16, False)) < 0.04 and far((torch.bfloat16, True)) < 0.04
    # the adapter says something
    assert (exact - cached_logits(peaked_model(7), ids)).norm() / exact.norm() > 0.1


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens():
    """--compile: rows in one fixed shape, some not in use, refilled."""
    model = peaked_model(5)

    def make():
        return [
            G.Request(ids, G.Decoding(4 + i % 17, num_beams=1 + i % 2))
            for i, ids in enumerate(prompts(12, 8))
        ]

    eager, compiled = (
        answer_all(model, make(), rows=5),
        answer_all(model, make(), rows=5, compile=True),
    )
    assert [(r.ids, r.finish_reason) for r in eager] == [(r.ids, r.finish_reason) for r in compiled]


def test_compiled_batches_of_one_process_are_apart():
    """A second batch, with other weights and another length, does not run what was compiled for the
    first."""
    for seed, max_len in ((5, 80), (6, 64), (6, 80)):
        model, make = (
            peaked_model(seed),
            lambda: [G.Request(ids, G.Decoding(12)) for ids in prompts(3, 8)],
        )
        eager, compiled = (
            answer_all(model, make(), 1, max_len, compile=compile) for compile in (False, True)
        )
        assert [r.ids for r in eager] == [r.ids for r in compiled]


def test_merge_and_compile_from_the_command_line(base, records, tmp_path):
    """--merge says what it lost and answers as the adapter does; what it does not fit with is
    said."""
    model, tokenizer = G.load_base(base, torch.device("cpu"), torch.float32)
    add_lora(model, LoRAConfig(r=4))
    for _, module in lora_linears(model):
        module.lora_b.data.normal_(0, 0.3)
    save_adapter(model, tmp_path / "adapter", base)

    def call(*args):
        command = [sys.executable, ROOT / "generate.py", "--base_model", base, "--lora_weights"]
        command += [tmp_path / "adapter", "--max_new_tokens", "8", "--dtype", "fp32", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    for name, more in (("plain", ()), ("merged", ("--merge",))):
        done = call("--instruct_dir", records, "--output", tmp_path / name, *more)
        assert done.returncode == 0 and (
            "merged 4 linears; the updates lose 0.0%" in done.stderr
        ) == bool(more), done.stderr
    answers = [
        [
            json.loads(line)["answer"]
            for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()
        ]
        for name in ("plain", "merged")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 8
    for args, words in (
        (("a", "--merge", "--use_lora=False"), "no adapter"),
        (("a", "--compile"), "--compile"),
    ):
        done = call(*args)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_prompts_of_one_id_share_a_first_step():
    """Nothing stands in the cache then, of any row: each answer is what it is alone."""
    model, ids = peaked_model(3), (5, 9, 31)
    asked = [G.Request([i], G.Decoding(max_new_tokens=12)) for i in ids]
    together = [request.ids for request in answer_all(model, asked, rows=3)]
    alone = [list(G.generate_ids(model, [i], 12, EOS)) for i in ids]
    assert together == alone and len({*map(tuple, alone)}) == 3
