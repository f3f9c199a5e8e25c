"""Claim: `swsc plan` reads only headers, in less than 60 s and 1 GB, also for 70B and 671B models.

    python -m benchmarks.plan DIR

Writes both checkpoints below DIR as sparse files (a few MB of disk), plans them, and prints a table.

Good result, exit code 0: both plans stay within the limits.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import print_markdown
from swsc_core.storage.safetensors_header import build_header

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 5_000_000_000
SECONDS, PEAK_BYTES = 60.0, 1e9

Shapes = dict[str, tuple[int, ...]]


def llama_70b() -> tuple[dict[str, object], Shapes]:
    """config.json and shapes of Llama-3-70B: 80 layers of grouped-query attention."""
    hidden, mlp, keys, vocabulary = 8192, 28672, 1024, 128256
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(80):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{role}_proj.weight": (hidden, hidden) for role in "qo"}
        shapes |= {f"{stem}.self_attn.{role}_proj.weight": (keys, hidden) for role in "kv"}
        shapes |= {f"{stem}.mlp.{role}_proj.weight": (mlp, hidden) for role in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (hidden, mlp)}
        shapes |= {f"{stem}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocabulary}
    return {"architectures": ["LlamaForCausalLM"], **config, **heads}, shapes


def deepseek_671b() -> tuple[dict[str, object], Shapes]:
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


def make(folder: Path, config: dict[str, object], shapes: Shapes) -> None:
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


def planned(folder: Path) -> tuple[float, int, str]:
    """Seconds and peak memory of `swsc plan`, and the line of its output that estimates the output size."""
    command = [
        sys.executable,
        "-m",
        "jobs",
        "plan",
        str(folder),
        "--include",
        "_proj",
        "--preset",
        "best",
        "--bits",
        "2.25",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [line for line in process.stdout if line.startswith("output_bytes")]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"plan of {folder} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, lines[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows, within_limits = [], True
    for name, (config, shapes) in {"Llama-3-70B": llama_70b(), "DeepSeek-V3 671B": deepseek_671b()}.items():
        make(folder / name.split()[0], config, shapes)
        seconds, peak, output = planned(folder / name.split()[0])
        within_limits &= seconds < SECONDS and peak < PEAK_BYTES
        rows.append([name, len(shapes), seconds, peak / 1e9, output])
    print_markdown(["shape of", "tensors", "seconds", "peak memory, GB", "estimated output"], rows)
    print("within the limits" if within_limits else "LIMITS EXCEEDED")
    raise SystemExit(not within_limits)


if __name__ == "__main__":
    main()
