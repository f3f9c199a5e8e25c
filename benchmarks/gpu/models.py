"""A small Llama: repeatability of calibration and tuning, evaluation against a CPU, memory against the estimates."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.finding import Bench, Finding
from pipeline.calibration.job import GatherHessians
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import Payload, to_tensor
from pipeline.engine.memory import CUDA
from pipeline.engine.worker import Worker
from pipeline.evaluation.job import MeasureLosses
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model, open_model
from pipeline.planning.memory import calibration_memory, evaluation_memory, hessian_bytes
from pipeline.tuning.job import TuneGradients, TuneStep
from pipeline.tuning.tuner import TuneKey

_LENGTH = 64


def models(bench: Bench) -> Iterator[Finding]:
    """Findings about calibration, tuning and evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        location = _make(Path(folder) / "model", bench)
        yield from _calibrations(location, bench)
        yield from _tunings(location, Path(folder) / "out", bench)
        yield from _evaluations(location, bench)


def _make(path: Path, bench: Bench) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import save_tokenizer

    torch.manual_seed(0)
    width = bench.size(1024, 64)
    config = LlamaConfig(
        vocab_size=bench.size(32000, 256),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 32,
        num_hidden_layers=bench.size(4, 1),
        num_key_value_heads=2,
        initializer_range=0.1,
        max_position_embeddings=512,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path)
    return str(path)


def _windows(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, (count, _LENGTH))


def _equal(first: Payload, second: Payload) -> bool:
    return all(torch.equal(to_tensor(a), to_tensor(b)) for a, b in zip(first.parts, second.parts, strict=True))


def _calibrations(location: str, bench: Bench) -> Iterator[Finding]:
    key, source = ModelKey(location, "auto", 1), open_checkpoint(location)
    infos = [info for name, info in source.tensors.items() if "_proj" in name and "layers.0." in name]
    names = [info.name for info in infos]
    payloads: list[Payload] = []
    job = GatherHessians(key, (tuple(names),), _windows(4), 0, 0)
    gather = lambda: payloads.extend(Worker(1, bench.device).run(job).payloads)  # noqa: E731
    peak = bench.peak(gather)
    gather()
    equal = _equal(*payloads)
    yield Finding("calibration twice", "equal" if equal else "different", ok=equal)
    if bench.on_gpu:
        sums = hessian_bytes(map(whole_matrix, infos))
        share = peak / (calibration_memory(Model(source, {}), _LENGTH, sums, "auto") - CUDA).device
        yield Finding("memory of a calibration over the estimate", share, "×", share <= 1)


def _tunings(location: str, out: Path, bench: Bench) -> Iterator[Finding]:
    from jobs.cli import main

    flags = ["--local", "--gpus-per-worker", "0", "--projectors", "q,down", "--clusters", "8", "--rank", "2"]
    assert main(["compress", location, str(out), *flags]) == 0
    key, steps = TuneKey(location, str(out), "auto"), []
    for _ in range(2):
        worker = Worker(1, bench.device)
        gradients = worker.run(TuneGradients(key, 0, _windows(2)))
        (state,) = worker.run(TuneStep(key, 1, 1e-3), *gradients.payloads).payloads
        steps.append((gradients.value, state))
        del worker
    equal = steps[0][0] == steps[1][0] and _equal(steps[0][1], steps[1][1])
    yield Finding("tuning step twice", "equal" if equal else "different", ok=equal)


def _evaluations(location: str, bench: Bench) -> Iterator[Finding]:
    key, model = ModelKey(location, "float32", 2), open_model(location)
    losses: list[tuple[float, ...]] = []
    job = MeasureLosses(key, _windows(4))
    peak = bench.peak(lambda: losses.append(Worker(1, bench.device).run(job).value.losses))
    expected = Worker(1, "cpu").run(job).value.losses
    gap = max(abs(a - b) for a, b in zip(losses[0], expected, strict=True))
    yield Finding("evaluation against a CPU, largest difference of a loss", gap, "nats", gap < 1e-3)
    if bench.on_gpu:
        share = peak / (evaluation_memory(model, "float32", 2 * _LENGTH) - CUDA).device
        yield Finding("memory of an evaluation over the estimate", share, "×", share <= 1)
