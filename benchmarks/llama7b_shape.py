"""Claim: compressing a checkpoint in the shape of Llama-2-7B keeps the driver below 1 GB and each worker below 1.5 GB.

    python -m benchmarks.llama7b_shape make DIR            writes 13.5 GB of random weights in two or three minutes
    python -m benchmarks.llama7b_shape run DIR OUT         compresses Q and K on its own Ray cluster

`run` samples the processes of the job every 0.2 s (watch.py), and prints their memory and where the workers' time went.

Good result, exit code 0: no process exceeds its limit.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.watch import Watch, print_memory, print_time, print_verdict

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 1_000_000_000
HIDDEN, MLP, VOCABULARY = 4096, 11008, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "attention_bias": False,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
# Seconds between samples, and the number of samples after which one is thorough.
INTERVAL, THOROUGH = 0.2, 5

Shapes = dict[str, tuple[int, ...]]


def shapes(layers: int) -> Shapes:
    """Names and shapes of the tensors, in the order of the real checkpoint."""
    tensors: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        tensors |= {f"{stem}.self_attn.{role}_proj.weight": (HIDDEN, HIDDEN) for role in "qkvo"}
        tensors |= {f"{stem}.mlp.{role}_proj.weight": (MLP, HIDDEN) for role in ("gate", "up")}
        tensors |= {f"{stem}.mlp.down_proj.weight": (HIDDEN, MLP)}
        tensors |= {f"{stem}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return tensors | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def shards(tensors: Shapes) -> list[Shapes]:
    """Tensors in order, divided into shards of at most SHARD_BYTES."""
    groups: list[Shapes] = [{}]
    for name, shape in tensors.items():
        if groups[-1] and sum(map(nbytes, groups[-1].values())) + nbytes(shape) > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = shape
    return groups


def pieces(group: Shapes, block: bytes) -> Iterator[bytes | memoryview]:
    """Bytes of a shard. Q and K are structured weights; all other tensors repeat one random block."""
    import torch

    from benchmarks.common import structured_weight
    from swsc_core.storage.safetensors_header import build_header

    yield build_header((name, "BF16", shape, nbytes(shape)) for name, shape in group.items())
    for name, shape in group.items():
        if "q_proj" in name or "k_proj" in name:
            seed = int.from_bytes(name.encode()[-40:], "little") % (1 << 62)
            yield structured_weight(shape[0], shape[1], seed).bfloat16().view(torch.uint8).numpy().data.cast("B")
            continue
        for start in range(0, nbytes(shape), len(block)):
            yield block[: nbytes(shape) - start]


def make(directory: str, layers: int) -> int:
    """Write the checkpoint, one shard at a time."""
    import torch

    from pipeline.checkpoints.weight_files import INDEX
    from pipeline.storage.store import Store

    started, store = time.perf_counter(), Store.at(directory)
    block = (0.02 * torch.randn(4 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    groups = shards(shapes(layers))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        store.write(file, pieces(group, block.view(torch.uint8).numpy().tobytes()))
        weight_map |= dict.fromkeys(group, file)
    total = sum(nbytes(shape) for group in groups for shape in group.values())
    store.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    store.write_json("config.json", {**CONFIG, "num_hidden_layers": layers})
    print(f"{store.root}: {total:,} bytes in {len(groups)} shards, {time.perf_counter() - started:.0f} s")
    return 0


def run(directory: str, output: str, address: str, workers: int | None) -> int:
    """Compress in another process, sample it, and print the samples; returns 1 if a limit is exceeded."""
    if Path(output).exists():
        print(
            f"{output} exists: a resumed run would be measured only in part; remove it",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, "-m", "jobs", "compress", directory, output, "--projectors", "q,k", "--bits", "3"]
    command += ["--count", "paper", "--address", address, *(["--workers", str(workers)] if workers else [])]
    started = time.perf_counter()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    watch = Watch(psutil.Process(driver.pid))
    samples = 0
    while driver.poll() is None:
        watch.sample(thorough=samples % THOROUGH == 0)
        samples += 1
        time.sleep(INTERVAL)
    wall = time.perf_counter() - started
    if driver.returncode:
        print(f"the run failed with exit code {driver.returncode}", file=sys.stderr)
        return 1
    report = json.loads(Path(output, "swsc_report.json").read_text())
    print_memory(watch)
    print_time(watch, report, wall)
    return print_verdict(watch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    maker = verbs.add_parser("make")
    maker.add_argument("directory")
    maker.add_argument("--scale-layers", type=int, default=32, help="number of layers (default: 32)")
    runner = verbs.add_parser("run")
    runner.add_argument("directory")
    runner.add_argument("output")
    runner.add_argument("--workers", type=int)
    runner.add_argument("--address", default="local", help="Ray cluster (default: start one)")
    given = parser.parse_args()
    if given.verb == "make":
        return make(given.directory, given.scale_layers)
    return run(given.directory, given.output, given.address, given.workers)


if __name__ == "__main__":
    sys.exit(main())
