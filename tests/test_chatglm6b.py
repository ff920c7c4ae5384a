"""ChatGLM-6B (v1) against a NumPy float64 model of the release's layout that shares no line with
ours: one pass, packed rows, the cache, gradients, and the folders that there are of it."""

import json
import sys
from io import BytesIO

import generate as G
import lora as L
import model as M
import train as T

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import RECORDS
from evaluate import continuation_logprobs
from numpy_glm import trained

HEADS, WIDTH, INNER, ROWS, LAYERS = 4, 64, 160, 120, 3
D = WIDTH // HEADS
CONFIG = {
    "architectures": ["ChatGLMModel"],
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "gmask_token_id": 130001,
    "hidden_size": WIDTH,
    "inner_hidden_size": INNER,
    "layernorm_epsilon": 1e-05,
    "mask_token_id": 130000,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "pad_token_id": 3,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "use_cache": True,
    "vocab_size": ROWS,
}


# --------------------------------------------------------------------------------------------------
# The oracle: the release's weights, a few numbers of them, and the network in float64


def release(seed=0, rows=ROWS, dtype=torch.float32):
    """{key: tensor} as the release names and shapes them, its norms in float32. What attention and
    the feed-forward add is made large, for alpha = 7.5 would hide it, and the latter's rows sum to
    zero, or one direction, that of a mean of gelu, would decide each token."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.25, dtype=dtype):
        return (torch.randn(shape, generator=random) * std).to(dtype)

    def norm(name):
        weight, bias = (draw(WIDTH, std=0.2, dtype=torch.float32) for _ in range(2))
        return {f"{name}.weight": weight + 1, f"{name}.bias": bias}

    w = {"transformer.word_embeddings.weight": draw(rows, WIDTH, std=0.1)}
    shapes = {
        "attention.query_key_value": (3 * WIDTH, WIDTH, 0.2),
        "attention.dense": (WIDTH, WIDTH, 0.8),
        "mlp.dense_h_to_4h": (INNER, WIDTH, 0.2),
        "mlp.dense_4h_to_h": (WIDTH, INNER, 0.8),
    }
    for i in range(LAYERS):
        p = f"transformer.layers.{i}."
        w |= norm(f"{p}input_layernorm") | norm(f"{p}post_attention_layernorm")
        w[f"{p}attention.rotary_emb.inv_freq"] = draw(D // 4)
        for name, (n_out, n_in, std) in shapes.items():
            w[f"{p}{name}.weight"] = draw(n_out, n_in, std=std)
            w[f"{p}{name}.bias"] = draw(n_out, std=0.3)
        down = w[f"{p}mlp.dense_4h_to_h.weight"]
        down -= down.mean(1, keepdim=True)
    w |= norm("transformer.final_layernorm")
    return w | {"lm_head.weight": w["transformer.word_embeddings.weight"].clone()}


def oracle(weights, ids, context):
    """Logits (T, V), float64, of a row whose first `context` tokens see each other."""
    w = {key: tensor.double().numpy() for key, tensor in weights.items()}
    speed = np.float64(np.float16(10000.0 ** (-np.arange(0, D // 2, 2) / (D // 2))))

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def turn(vector, t):
        """Half a head by the place in the context, half by the place behind it."""
        halves = []
        for half, position in zip(
            np.split(vector, 2), (min(t, context - 1), max(t - context + 1, 0))
        ):
            z = (half[: D // 4] + 1j * half[D // 4 :]) * np.exp(1j * position * speed)
            halves += [z.real, z.imag]
        return np.concatenate(halves)

    x, alpha = w["transformer.word_embeddings.weight"][ids], np.sqrt(2 * 28)
    for i in range(LAYERS):
        p = f"transformer.layers.{i}."
        n = norm(x, p + "input_layernorm")
        fused = linear(n, p + "attention.query_key_value").reshape(len(ids), HEADS, 3, D)
        seen = np.zeros((len(ids), HEADS, D))
        for head in range(HEADS):
            q, k = ([turn(fused[t, head, j], t) for t in range(len(ids))] for j in (0, 1))
            for t in range(len(ids)):
                whom = [s for s in range(len(ids)) if s <= t or s < context]
                score = np.array([q[t] @ k[s] for s in whom]) / np.sqrt(D)
                weight = np.exp(score - score.max())
                seen[t, head] = weight / weight.sum() @ fused[whom, head, 2]
        x = alpha * n + linear(seen.reshape(len(ids), -1), p + "attention.dense")
        n = norm(x, p + "post_attention_layernorm")
        a = linear(n, p + "mlp.dense_h_to_4h")
        gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
        x = alpha * n + linear(gelu, p + "mlp.dense_4h_to_h")
    x = norm(x, "transformer.final_layernorm")
    return x @ w["lm_head.weight"].T


def write_release(folder, weights, shards=3, **changes):
    """The weights in a folder as the release has it: pickles with an index, whose total_size was
    never mended."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    keys, places = list(weights), {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = keys[number * len(keys) // shards : (number + 1) * len(keys) // shards]
        torch.save({key: weights[key] for key in part}, folder / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 13744473856}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"), release())


@pytest.fixture
def model(folder):
    return M.load_model(folder)


def difference(ours, exact):
    return np.abs(ours.double().numpy() - exact).max()


# --------------------------------------------------------------------------------------------------
# Logits: packed rows, the cache, a batch

RAGGED = [
    ([5, 9, 77, 3, 110, 42, 8, 6, 33, 101], 4),
    ([17, 2, 90], 1),
    ([64, 64, 11, 29, 7, 50, 98, 31, 12, 45, 71, 3, 88], 12),
    ([99, 1, 2, 3, 4, 5, 6], 6),
]


def test_packed_rows_of_unequal_contexts_equal_the_oracle(model):
    """One pass; a context that is off by one would be seen."""
    rows = [T.Row(ids + [0], [False] * (c + 1) + [True] * (len(ids) - c)) for ids, c in RAGGED]
    ids, labels, packed = T.collate(rows, "cpu", share=True, glm=True)
    with torch.no_grad():
        states = model.hidden_states(ids, packed)
        logits = model.lm_head(states)[0]
    start, weights = 0, release()
    for row, context in RAGGED:
        ours = logits[start : start + len(row)]
        assert difference(ours, oracle(weights, row, context)) < 1e-5
        for other in (context - 1, context + 1):
            if 0 < other < len(row):
                assert difference(ours, oracle(weights, row, other)) > 0.01
        assert labels[0, start : start + len(row)].tolist() == [-100] * context + row[
            context + 1 :
        ] + [0]
        start += len(row)


def test_cache_equals_the_oracle(model):
    """The context in one call, then token by token, and several tokens at once."""
    weights = release()
    for ids, context in RAGGED[:3]:
        for cuts in ([1] * (len(ids) - context), [len(ids) - context]):
            cache = model.new_cache(2, 16)
            with torch.no_grad():
                first = torch.tensor([ids[:context]])
                logits = [model(first, cache.rows(1, [0], prefix=context))]
                rest = cache.rows(1, [context], prefix=torch.tensor([[context]]))
                for part in torch.tensor([ids[context:]]).split(cuts, 1):
                    logits.append(model(part, rest))
            assert difference(torch.cat(logits, 1)[0], oracle(weights, ids, context)) < 1e-5


def test_batch_of_unequal_prompts_equals_the_oracle(model, monkeypatch):
    """Five requests in a batch of three rows: every step's logits of every row are those that the
    oracle has for it alone, also of rows that moved; a prompt is never run in chunks."""
    monkeypatch.setattr(G, "PREFILL_CHUNK", 2)
    weights, count = release(), 0
    prompts = [RAGGED[0][0], RAGGED[1][0], RAGGED[2][0], RAGGED[3][0], RAGGED[0][0][3:]]
    batch = G.Batch(model, 3, 32)
    requests = [G.Request(p, G.Decoding(max_new_tokens=2 + i)) for i, p in enumerate(prompts)]
    for request in requests:
        batch.submit(request)
    forward = batch.forward

    def checked(fed, longest):
        nonlocal count
        logits = forward(fed, longest)
        for row, ours in zip(batch.rows, logits):
            exact = oracle(weights, row.ids, len(row.request.prompt_ids) - 1)[-1]
            assert difference(ours, exact) < 1e-5
            count += 1
        return logits

    batch.forward = checked
    while not all(request.finish_reason for request in requests):
        batch.step()
    assert count == sum(len(request.ids) for request in requests) == 2 + 3 + 4 + 5 + 6


def test_beams_have_the_oracles_scores(model):
    prompt = RAGGED[0][0]
    request = G.Request(prompt, G.Decoding(max_new_tokens=4, num_beams=4, length_penalty=0.0))
    batch = G.Batch(model, 4, 16)
    batch.submit(request)
    while not request.finish_reason:
        batch.step()
    weights, scores = release(), []
    for row in request.ranked:
        logits = oracle(weights, row.ids, len(prompt) - 1)[len(prompt) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores.append(logprobs[np.arange(4), row.ids[len(prompt) :]].sum())
        assert abs(scores[-1] - row.score) < 1e-4
    greedy = list(G.generate_ids(model, prompt, 4))
    assert scores == sorted(scores, reverse=True) and request.ids == request.ranked[0].ids[10:]
    assert len({tuple(row.ids) for row in request.ranked}) == 4 and len(greedy) == 4


def test_likelihoods_are_the_oracles(model):
    """As the exams score options behind one prompt."""
    prompt, options = RAGGED[0][0], [[7, 60], [91], [3, 3, 105, 12]]
    for option, ours in zip(options, continuation_logprobs(model, prompt, options)):
        logits = oracle(release(), prompt + option, len(prompt) - 1)[len(prompt) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert abs(logprobs[np.arange(len(option)), option].sum() - ours) < 1e-4


# --------------------------------------------------------------------------------------------------
# Gradients: autograd of plain code, in float64, of rows padded behind


def release_rows(part):
    """The release's row of each of our rows of q, k or v (part 0, 1, 2): a head's q, k, v follow
    each other there; RoPE's pairs are i, i + D/4 of each half of a head, and i, i + D/2 here."""
    within = range(D)
    if part < 2:
        quarter = range(D // 4)
        within = [
            half * D // 2 + b * D // 4 + i for b in (0, 1) for half in (0, 1) for i in quarter
        ]
    return torch.tensor([(head * 3 + part) * D + i for head in range(HEADS) for i in within])


def as_released(model):
    """{key: float64} of a model in the release's layout, updates merged; differentiable."""
    (named, matrix, bias), w = trained(model), {}
    for i in range(LAYERS):
        ours, theirs = f"layers.{i}.", f"transformer.layers.{i}."
        for make, kind in ((matrix, "weight"), (bias, "bias")):
            qkv = [make(f"{ours}self_attn.{n}_proj") for n in "qkv"]
            rows = torch.cat([release_rows(part) for part in range(3)])
            fused = torch.cat(qkv)[rows.argsort()]
            w[f"{theirs}attention.query_key_value.{kind}"] = fused
            w[f"{theirs}attention.dense.{kind}"] = make(f"{ours}self_attn.o_proj")
            w[f"{theirs}mlp.dense_h_to_4h.{kind}"] = make(f"{ours}mlp.up_proj")
            w[f"{theirs}mlp.dense_4h_to_h.{kind}"] = make(f"{ours}mlp.down_proj")
            for norm in ("input_layernorm", "post_attention_layernorm"):
                w[f"{theirs}{norm}.{kind}"] = named[f"{ours}{norm}.{kind}"].double()
    for kind in ("weight", "bias"):
        w[f"transformer.final_layernorm.{kind}"] = named[f"norm.{kind}"].double()
    w["transformer.word_embeddings.weight"] = named["embed_tokens.weight"].double()
    return w


def plain_logits(w, ids, contexts):
    """Logits (B, T, V) of rows padded behind, whose first contexts[b] tokens see each other."""
    B, T_ = ids.shape
    t, c = torch.arange(T_), torch.tensor(contexts)[:, None]
    p, b = torch.minimum(t.expand(B, T_), c - 1), (t - c + 1).clamp(min=0)
    speed = (10000.0 ** (-torch.arange(0, D // 2, 2) / (D // 2))).half().double()
    unseen = (t[None, None] > t[None, :, None]) & (t[None, None] >= c[..., None])

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def turned(x):  # (B, T, H, D)
        halves = []
        for half, place in zip(x.chunk(2, -1), (p, b)):
            angle = (place[..., None].double() * speed)[:, :, None]
            first, second = half.chunk(2, -1)
            halves.append(first * angle.cos() - second * angle.sin())
            halves.append(second * angle.cos() + first * angle.sin())
        return torch.cat(halves, -1)

    x, alpha = w["transformer.word_embeddings.weight"][ids], 56**0.5
    for i in range(LAYERS):
        at = f"transformer.layers.{i}."

        def linear(x, name, at=at):
            return F.linear(x, w[f"{at}{name}.weight"], w[f"{at}{name}.bias"])

        n = norm(x, f"{at}input_layernorm")
        q, k, v = linear(n, "attention.query_key_value").view(B, T_, HEADS, 3, D).unbind(3)
        scores = torch.einsum("bthd,bshd->bhts", turned(q), turned(k)) / D**0.5
        weight = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weight, v).flatten(2)
        n = norm(alpha * n + linear(y, "attention.dense"), f"{at}post_attention_layernorm")
        up = F.gelu(linear(n, "mlp.dense_h_to_4h"), approximate="tanh")
        x = alpha * n + linear(up, "mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ w["transformer.word_embeddings.weight"].T


def test_the_plain_code_is_the_oracle(model):
    ids = torch.tensor([RAGGED[0][0], RAGGED[2][0][:10]])
    with torch.no_grad():
        plain = plain_logits(as_released(model), ids, [4, 9])
    for row, context, logits in zip(ids.tolist(), (4, 9), plain):
        # the tensors are of float32, and were made tied
        assert difference(logits, oracle(release(), row, context)) < 1e-9


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("size", [{}, {"micro_batch_size": 2}], ids=["all at once", "by twos"])
def test_gradients_equal_those_of_plain_code(model, full, size):
    if full:
        model.requires_grad_(True)
    else:
        assert L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",))) == 6 * LAYERS
        for _, module in L.lora_linears(model):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    ended = [(ids + [70, 4], c) for ids, c in RAGGED]
    rows = [T.Row(ids, [False] * (c + 1) + [True] * (len(ids) - c - 1)) for ids, c in ended]
    config = T.TrainConfig(full=full, **size)
    loss = T.step_gradient(model.train(), rows, config)
    # The same, padded and in float64.
    width = max(map(len, rows))
    ids = torch.tensor([row.ids + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([row.mask + [False] * (width - len(row)) for row in rows])[:, 1:]
    logits = plain_logits(as_released(model), ids, [c for _, c in RAGGED])
    exact = F.cross_entropy(logits[:, :-1][mask], ids[:, 1:][mask])
    assert abs(loss - exact.item()) < 1e-5
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(exact, trained.values())
    assert len(gradients) == (2 * 6 * LAYERS if not full else 3 + 16 * LAYERS)
    for (name, p), plain in zip(trained.items(), gradients):
        worst = (p.grad - plain).abs().max()
        assert worst < 1e-5 * max(1, plain.abs().max()), (name, worst)


# --------------------------------------------------------------------------------------------------
# Folders: as released, of its first weeks, damaged, and as we write them

IDS, CONTEXT = RAGGED[0]


def cached(model, ids=IDS, context=CONTEXT):
    """Logits (T, V) of a row by way of the cache."""
    cache = model.new_cache(1, len(ids))
    with torch.no_grad():
        first = model(torch.tensor([ids[:context]]), cache.rows(0, [0], prefix=context))
        rest = cache.rows(0, [context], prefix=torch.tensor([[context]]))
        return torch.cat([first, model(torch.tensor([ids[context:]]), rest)], 1)[0]


def test_the_config_is_understood(folder):
    c = M.Checkpoint(folder).config
    assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers) == (WIDTH, INNER, LAYERS)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (HEADS, HEADS, D)
    assert (c.vocab_size, c.rms_norm_eps, c.max_position_embeddings) == (ROWS, 1e-5, 2048)
    assert c.tie_word_embeddings  # what a missing key means in transformers
    tensors = dict(M.Checkpoint(folder).read())
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    fused = [name for name in tensors if "_proj" in name and "self_attn.o" not in name]
    assert len(fused) == 10 * LAYERS and len(storages) == len(tensors)


def test_float32_norms_in_a_float16_folder(tmp_path):
    weights = release(dtype=torch.float16)
    write_release(tmp_path, weights, 8)
    found = M.Checkpoint(tmp_path)
    assert found.dtype == torch.float16 and M.load_model(tmp_path).norm.weight.dtype == found.dtype
    ours = M.load_model(tmp_path, dtype=torch.float32)
    assert difference(cached(ours), oracle(weights, IDS, CONTEXT)) < 1e-5
    # Stored in float16, computed in float32: the norms' weights are rounded, and that is all.
    stored = M.load_model(tmp_path)
    stored.compute_dtype = torch.float32
    rounded = {key: tensor.half() for key, tensor in weights.items()}
    assert difference(cached(stored), oracle(rounded, IDS, CONTEXT)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_weeks_folder_is_read_without_its_image_rows(tmp_path, monkeypatch, tied):
    """150,528 rows, of which the first 20,000 stand for images: ids are those of today."""
    monkeypatch.setitem(globals(), "WIDTH", 16)
    monkeypatch.setitem(globals(), "D", 4)
    weights = release(rows=150528, dtype=torch.float16)
    changes = {"hidden_size": 16, "vocab_size": 150528, "bos_token_id": 150004}
    if not tied:
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)
        changes |= {"tie_word_embeddings": False}
    write_release(tmp_path, weights, **changes)
    model = M.load_model(tmp_path, dtype=torch.float32)
    assert model.config.vocab_size == 130528 == len(model.embed_tokens.weight)
    names = ("transformer.word_embeddings.weight", "lm_head.weight")
    slim = weights | {name: weights[name][20000:] for name in names}
    ids = [130527, 5, 0, 74874, 130001, 130004, 99]
    assert difference(cached(model, ids, 5), oracle(slim, ids, 5)) < 1e-5
    # Written again it is one dtype's, and slim.
    M.convert(tmp_path, tmp_path / "new")
    stored, again = M.load_model(tmp_path), M.load_model(tmp_path / "new")
    assert again.config == model.config
    assert all(map(torch.equal, stored.parameters(), again.parameters()))


def test_a_head_of_its_own(tmp_path):
    """It must be said; else a head that differs from the embedding is damage."""
    weights = release()
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(1)
    with pytest.raises(ValueError, match=r"lm_head.weight .*pytorch_model-00003-of"):
        M.load_model(write_release(tmp_path, weights))
    write_release(tmp_path, weights, tie_word_embeddings=False)
    assert difference(cached(M.load_model(tmp_path)), oracle(weights, IDS, CONTEXT)) < 1e-5
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lacks lm_head.weight"):
        M.load_model(write_release(tmp_path, weights, tie_word_embeddings=False))
    M.load_model(write_release(tmp_path, weights))


LAYER = "transformer.layers.1."
DAMAGE = {
    "a bias is missing": ("attention.dense.bias", lambda t: None),
    "fused rows are missing": ("attention.query_key_value.weight", lambda t: t[:-1]),
    "a fused bias is a matrix": ("attention.query_key_value.bias", lambda t: t[:, None]),
    "a norm is too wide": ("input_layernorm.weight", lambda t: t.repeat(2)),
    "integers": ("mlp.dense_h_to_4h.weight", lambda t: t.to(torch.int8)),
    "not a number": ("mlp.dense_4h_to_h.bias", lambda t: t * torch.nan),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    name, change = DAMAGE[damage]
    weights = release()
    changed = change(weights[LAYER + name])
    weights = {key: changed if key == LAYER + name else t for key, t in weights.items()}
    write_release(tmp_path, {key: t for key, t in weights.items() if t is not None})
    with pytest.raises(ValueError, match=rf"pytorch_model-\d.*{LAYER}{name}"):
        M.load_model(tmp_path)


def test_rows_that_the_config_does_not_know(tmp_path):
    """20,000 too many are the images', whichever config lies beside them; one is damage."""
    with pytest.raises(ValueError, match=r"pytorch_model-00001.*word_embeddings"):
        M.load_model(write_release(tmp_path, release(rows=ROWS + 1)))
    weights = release(rows=ROWS + 20000)
    model = M.load_model(write_release(tmp_path, weights))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"][20000:])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"quantization_bit": 4}, "quantization_bit"),
        ({"pre_seq_len": 128}, "pre_seq_len"),
        ({"inner_hidden_size": None}, "intermediate_size"),
        ({"num_attention_heads": 7}, "head"),
    ],
)
def test_what_is_not_chatglm_6b_is_named(tmp_path, changes, named):
    with pytest.raises(ValueError, match=rf"config.json.*{named}"):
        M.load_model(write_release(tmp_path, release(), **changes))


def adapted(folder, dtype=None):
    model = M.load_model(folder, dtype=dtype)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    torch.manual_seed(0)
    for _, module in L.lora_linears(model):
        torch.nn.init.normal_(module.lora_b, std=0.1)
    return model


def test_adapters_and_merged_folders_come_back(folder, tmp_path):
    model = adapted(folder)
    wanted = cached(model)
    assert (wanted - cached(M.load_model(folder))).abs().max() > 0.1
    L.save_adapter(model, tmp_path / "adapter", str(folder))
    again = M.load_model(folder)
    L.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(cached(again), wanted)
    merged = {"output_dir": str(tmp_path / "merged"), "lora_weights": str(tmp_path / "adapter")}
    L.export(folder, L.Options(**merged, max_shard_gb=2**14 / 2**30))
    with pytest.raises(ValueError, match="params.json"):  # and leaves nothing there
        L.export(folder, L.Options(output_dir=str(tmp_path / "meta"), layout="meta"))
    assert not (tmp_path / "meta").exists()
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    merged = M.load_model(tmp_path / "merged")
    assert (cached(merged) - wanted).abs().max() < 1e-4
    # The same weights, bias by bias, in either folder: the fingerprint says so.
    M.convert(folder, tmp_path / "converted")
    assert M.describe_model(folder)[-1] == M.describe_model(tmp_path / "converted")[-1]
    theirs = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert theirs["gmask_token_id"] == 130001 and theirs["inner_hidden_size"] == INNER


def test_an_adapter_of_peft_has_one_fused_target(folder, tmp_path):
    """query_key_value, as mymusise and THUDM tune it: A is one for all, B is cut by heads."""
    random, weights, state = torch.Generator().manual_seed(1), release(), {}
    for i in range(LAYERS):
        name = f"transformer.layers.{i}.attention.query_key_value"
        a = torch.randn(8, WIDTH, generator=random) * 0.1
        b = torch.randn(3 * WIDTH, 8, generator=random) * 0.1
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 32 / 8 * b @ a
    torch.save(state, tmp_path / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    settings |= {"target_modules": ["query_key_value"], "bias": "none", "fan_in_fan_out": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = M.load_model(folder)
    before = cached(model)
    L.load_adapter(model, tmp_path)
    assert difference(cached(model), oracle(weights, IDS, CONTEXT)) < 1e-5
    assert (cached(model) - before).abs().max() > 0.1


def test_all_trained_weights_come_back(folder, tmp_path):
    """As --full writes them, in float32 whatever the base has."""
    model = M.load_model(folder)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1
    M.save_model(model, tmp_path / "full", folder)
    assert torch.equal(cached(M.load_model(tmp_path / "full")), cached(model))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_linears_keep_their_biases(folder, kind):
    """The logits of a model whose matrices are the dequantised ones."""
    model, plain = L.quantize(M.load_model(folder), kind), M.load_model(folder)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, L.QUANTISED[kind])]
    assert len(found) == 6 * LAYERS
    for name, module in found:
        unit, linear = torch.eye(module.in_features), plain.get_submodule(name)
        assert torch.equal(module.bias, linear.bias)
        linear.weight.copy_((module(unit) - module.bias).T)
    exact = cached(plain)
    assert (cached(model) - exact).abs().max() < 1e-4
    assert (exact - cached(M.load_model(folder))).abs().max() > 1e-3
    assert len(list(G.generate_ids(model, IDS, 5, num_beams=3))) == 5


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_decoding_equals_eager(folder, rows):
    """Parts of a fused tensor that shared its memory made compiled steps of several rows wrong,
    from the second on and silently."""
    model, answers = M.load_model(folder), []
    for compile in (False, True):
        requests = [G.Request(ids, G.Decoding(max_new_tokens=8)) for ids, _ in RAGGED]
        batch = G.Batch(model, rows, 32, compile=compile)
        for request in requests:
            batch.submit(request)
        while not all(request.finish_reason for request in requests):
            batch.step()
        answers.append([request.ids for request in requests])
    assert answers[0] == answers[1] and len({tuple(ids) for ids in answers[0]}) == len(RAGGED)


def test_training_refuses_what_the_prompt_cannot_learn(folder):
    """Its tokens see each other, so none of them can be a target."""
    for settings in ({"train_on_inputs": True}, {"train_on": "all"}):
        with pytest.raises(ValueError, match="train_on"):
            T.check_targets(M.Checkpoint(folder).config, T.TrainConfig(**settings))


# --------------------------------------------------------------------------------------------------
# From records to an answer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as Med-ChatGLM's is: its first weeks' ice_text.model, which has text pieces alone,
    float16, and added_tokens.json with an id of the longer vocabulary that image tokens made."""
    folder, out = tmp_path_factory.mktemp("base"), BytesIO()
    texts = [f"问题：{r['instruction']}\n回答: {r['output']}" for r in RECORDS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3),
        model_writer=out,
        vocab_size=130,
        character_coverage=1.0,
        hard_vocab_limit=False,
        user_defined_symbols=["<pad>", "<n>"],
        minloglevel=2,
    )
    (folder / "ice_text.model").write_bytes(out.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps({"</s>": 150344}))
    size = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).get_piece_size() + 344
    weights = release(rows=size + 8, dtype=torch.float16)
    changes = {"vocab_size": size + 8, "bos_token_id": size - 340, "eos_token_id": size - 339}
    return write_release(folder, weights, **changes)


def test_what_training_shows_is_what_asking_shows(base):
    """The same ids, of which the same ones see each other."""
    tokenizer, template = G.load_tokenizer(base), G.load_template("med_chatglm")
    record = RECORDS[0]
    row = T.encode_example(tokenizer, template, record, T.TrainConfig())
    first = row.mask.index(True)
    asked = [{"role": "user", "content": record["instruction"]}]
    assert row.ids[:first] == G.render_prompt(tokenizer, template, asked)
    gmask, sop, eop = (tokenizer.special[name] for name in ("[gMASK]", "<sop>", "<eop>"))
    assert row.ids[first - 2 : first] == [gmask, sop] and row.ids[-1] == eop
    *_, packed = T.collate([row], "cpu", glm=True)
    assert packed.prefix.unique().tolist() == [first - 1]
    seen = packed.mask[0, 0].sum(1)  # all of the context see it, sop one more, and so on
    assert seen.tolist() == [first - 1] * (first - 1) + [*range(first, len(row))]
    assert tokenizer.decode(row.ids[first:]) == record["output"]


@pytest.mark.parametrize("how", ["lora", "full", "int8"])
def test_train_then_ask(base, tmp_path, how, monkeypatch, capsys):
    """Two steps, whose loss is that of plain code; what was trained answers."""

    def command(script, *args):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, args)])
        script.main()
        return capsys.readouterr().out

    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    lines = (
        {"context": f"问题：{r['instruction']}\n回答: ", "target": r["output"]} for r in RECORDS
    )
    M.write_json_lines(data, lines)
    more = {"lora": (), "full": ("--full",), "int8": ("--base_dtype", "int8")}[how]
    more = (*more, "--lora_dropout", 0, "--dtype", "fp32", "--val_set_size", 0, "--max_steps", 2)
    more = (*more, "--prompt_template_name", "med_chatglm", "--learning_rate", 1e-3)
    paths = ("--base_model", base, "--data_path", data, "--output_dir", out)
    command(T, *paths, *more, "--batch_size", len(RECORDS))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[1]["loss"] < log[0]["loss"]
    if how == "full":
        ask = ("--base_model", out, "--use_lora", False, "--prompt_template", "med_chatglm")
    else:
        ask = ("--base_model", base, "--lora_weights", out)
    if how == "lora":
        assert abs(log[0]["loss"] - plain_loss(base)) < 1e-4
    assert command(G, RECORDS[0]["instruction"], *ask, "--max_new_tokens", 8).strip()


def plain_loss(base):
    """Loss per target of all records at once, padded and in float64."""
    tokenizer, template = G.load_tokenizer(base), G.load_template("med_chatglm")
    rows = [T.encode_example(tokenizer, template, r, T.TrainConfig()) for r in RECORDS]
    width = max(map(len, rows))
    ids = torch.tensor([row.ids + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([row.mask + [False] * (width - len(row)) for row in rows])[:, 1:]
    model = M.load_model(base, dtype=torch.float32)
    logits = plain_logits(as_released(model), ids, [row.mask.index(True) - 1 for row in rows])
    return F.cross_entropy(logits[:, :-1][mask], ids[:, 1:][mask]).item()
