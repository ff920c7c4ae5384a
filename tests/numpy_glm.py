"""ChatGLM in NumPy float64, under the names and in the layouts of the published checkpoints: an
oracle that shares no line with model.py. `random_` makes weights, `write_` the folder that holds
them as published: pytorch_model.bin in shards, with an index."""

import json

import numpy as np
import torch

CHATGLM3 = {  # config.json as published with ChatGLM3-6B; the shape is cut down
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 96,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 304,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def write_bins(folder, config, state, files):
    """A folder as published: config.json, and so many shards by an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = {
        key: f"pytorch_model-{i % files + 1:05}-of-{files:05}.bin" for i, key in enumerate(state)
    }
    for name in set(names.values()):
        torch.save({k: t for k, t in state.items() if names[k] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def random_chatglm3(config, seed=0, dtype=torch.float32):
    """ChatGLM2's and ChatGLM3's weights by their published names, norms in float32. Large enough
    that a wrong row, bias or position moves the logits."""
    C, F, V = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    D, groups = config["kv_channels"], config["multi_query_group_num"]
    Q = config["num_attention_heads"] * D
    shapes = {"embedding.word_embeddings.weight": (V, C), "rotary_pos_emb.inv_freq": (D // 4,)}
    for i in range(config["num_layers"]):
        layer = {
            "input_layernorm.weight": (C,),
            "self_attention.query_key_value.weight": (Q + 2 * groups * D, C),
            "self_attention.query_key_value.bias": (Q + 2 * groups * D,),
            "self_attention.dense.weight": (C, Q),
            "post_attention_layernorm.weight": (C,),
            "mlp.dense_h_to_4h.weight": (2 * F, C),
            "mlp.dense_4h_to_h.weight": (C, F),
        }
        shapes |= {f"encoder.layers.{i}.{key}": shape for key, shape in layer.items()}
    shapes |= {"encoder.final_layernorm.weight": (C,), "output_layer.weight": (V, C)}
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * (0.4 if "bias" in key else 0.15)
        norm = key.endswith("layernorm.weight")
        state[f"transformer.{key}"] = tensor + 1 if norm else tensor.to(dtype)
    return state


def chatglm3(state, config, ids):
    """Logits (T, V) of one row: RMSNorm, q, k, v of one product, half of each head turned in pairs
    of neighbours, groups of heads with one key and value, silu(gate) up."""
    w = {key.removeprefix("transformer."): t.double().numpy() for key, t in state.items()}
    H, K, D = (config[k] for k in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    T, turned = len(ids), D // 2
    base = 10000.0 * config.get("rope_ratio", 1)
    turn = np.exp(1j * np.outer(np.arange(T), base ** (-np.arange(0, turned, 2) / turned)))

    def norm(x, g):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["layernorm_epsilon"]) * g

    def rotate(x):  # (T, D)
        x = x.copy()
        z = (x[:, 0:turned:2] + 1j * x[:, 1:turned:2]) * turn
        x[:, 0:turned:2], x[:, 1:turned:2] = z.real, z.imag
        return x

    x = w["embedding.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        p = f"encoder.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        fused = h @ w[p + "self_attention.query_key_value.weight"].T
        fused = fused + w[p + "self_attention.query_key_value.bias"]
        q, k, v = np.split(fused, [H * D, (H + K) * D], axis=1)
        out = np.zeros((T, H * D))
        for head in range(H):
            own, group = slice(head * D, (head + 1) * D), head // (H // K)
            shared = slice(group * D, (group + 1) * D)
            scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(D)
            scores[np.triu_indices(T, 1)] = -np.inf
            out[:, own] = softmax(scores) @ v[:, shared]
        x = x + out @ w[p + "self_attention.dense.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = np.split(h @ w[p + "mlp.dense_h_to_4h.weight"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.dense_4h_to_h.weight"].T
    return norm(x, w["encoder.final_layernorm.weight"]) @ w["output_layer.weight"].T


def trained(model):
    """(Parameters by name, and functions that give a linear's weight, its update merged, and its
    bias by name) of a model of ours; float64, differentiable."""
    named = dict(model.named_parameters())

    def matrix(name):
        if f"{name}.lora_a" not in named:
            return named[f"{name}.weight"].double()
        scale = model.get_submodule(name).config.scale
        a, b = named[f"{name}.lora_a"].double(), named[f"{name}.lora_b"].double()
        return named[f"{name}.base.weight"].double() + scale * b @ a

    def bias(name):
        return named.get(f"{name}.bias", named.get(f"{name}.base.bias")).double()

    return named, matrix, bias
