"""Checkpoints of sparse files in the shapes of well-known models: real headers and sizes, but no weights."""

import json
import os
from pathlib import Path

from swsc_core.storage.safetensors_header import build_header

SHARD_BYTES = 5_000_000_000

Config = dict[str, object]
Shapes = dict[str, tuple[int, ...]]


def llama_7b() -> tuple[Config, Shapes]:
    """config.json and shapes of Llama-2-7B."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    return _llama(32, (4096, 11008, 4096, 32000), heads)


def llama_70b() -> tuple[Config, Shapes]:
    """config.json and shapes of Llama-3-70B: 80 layers of grouped-query attention."""
    return _llama(80, (8192, 28672, 1024, 128256), {"num_attention_heads": 64, "num_key_value_heads": 8})


def _llama(layers: int, sizes: tuple[int, int, int, int], heads: dict[str, int]) -> tuple[Config, Shapes]:
    """`sizes` are those of the hidden states, of the feed-forward layers, of keys, and of the vocabulary."""
    hidden, mlp, keys, vocabulary = sizes
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{role}_proj.weight": (hidden, hidden) for role in "qo"}
        shapes |= {f"{stem}.self_attn.{role}_proj.weight": (keys, hidden) for role in "kv"}
        shapes |= {f"{stem}.mlp.{role}_proj.weight": (mlp, hidden) for role in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (hidden, mlp)}
        shapes |= {f"{stem}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return {"architectures": ["LlamaForCausalLM"], **config, **heads, "vocab_size": vocabulary}, shapes


def mixtral_8x22b() -> tuple[Config, Shapes]:
    """config.json and shapes of Mixtral-8x22B: 56 layers of 8 experts."""
    hidden, mlp, keys, vocabulary = 6144, 16384, 1024, 32768
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(56):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{role}_proj.weight": (hidden, hidden) for role in "qo"}
        shapes |= {f"{stem}.self_attn.{role}_proj.weight": (keys, hidden) for role in "kv"}
        shapes |= {f"{stem}.block_sparse_moe.gate.weight": (8, hidden)}
        for expert in range(8):
            name = f"{stem}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.{role}.weight": (mlp, hidden) for role in ("w1", "w3")}
            shapes |= {f"{name}.w2.weight": (hidden, mlp)}
        shapes |= {f"{stem}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {"model_type": "mixtral", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 56}
    heads = {"num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": vocabulary}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return {"architectures": ["MixtralForCausalLM"], **config, **heads, **experts}, shapes


def deepseek_671b() -> tuple[Config, Shapes]:
    """config.json and shapes of DeepSeek-V3: latent attention, 256 experts of three matrices in each of 58 layers."""
    hidden, expert, vocabulary = 7168, 2048, 129280
    latent = {"q_a_proj": (1536, hidden), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, hidden)}
    latent |= {"kv_b_proj": (32768, 512), "o_proj": (hidden, 16384)}
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(61):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{name}.weight": shape for name, shape in latent.items()}
        shapes |= {f"{stem}.self_attn.q_a_layernorm.weight": (1536,), f"{stem}.self_attn.kv_a_layernorm.weight": (512,)}
        if layer > 2:
            shapes |= {f"{stem}.mlp.gate.weight": (256, hidden), f"{stem}.mlp.gate.e_score_correction_bias": (256,)}
        experts = [f"experts.{number}." for number in range(256)] + ["shared_experts."] if layer > 2 else [""]
        wide = expert if layer > 2 else 18432
        for name in experts:
            shapes |= {f"{stem}.mlp.{name}{role}_proj.weight": (wide, hidden) for role in ("gate", "up")}
            shapes |= {f"{stem}.mlp.{name}down_proj.weight": (hidden, wide)}
        shapes |= {f"{stem}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {"model_type": "deepseek_v3", "hidden_size": hidden, "intermediate_size": 18432, "num_hidden_layers": 61}
    heads = {"num_attention_heads": 128, "num_key_value_heads": 128, "qk_nope_head_dim": 128, "v_head_dim": 128}
    mixture = {"n_routed_experts": 256, "first_k_dense_replace": 3, "moe_intermediate_size": expert}
    return {"architectures": ["DeepseekV3ForCausalLM"], **config, **heads, **mixture, "vocab_size": vocabulary}, shapes


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def make(folder: Path, config: Config, shapes: Shapes) -> None:
    """Write a checkpoint of sparse files: real headers and sizes, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled + nbytes(shape) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes(shape)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = build_header((name, "BF16", shape, nbytes(shape)) for name, shape in shard.items())
        (folder / file).write_bytes(header)
        os.truncate(folder / file, len(header) + sum(map(nbytes, shard.values())))
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
