"""A small Llama: calibrated twice, tuned twice, evaluated beside a CPU, its memory beside the estimates."""

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
from pipeline.engine.worker import Worker
from pipeline.evaluation.job import MeasureLosses
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import open_model
from pipeline.planning.cost_model import calibration_device_bytes, evaluation_device_bytes, hessian_bytes
from pipeline.tuning.job import TuneGradients, TuneStep
from pipeline.tuning.tuner import TuneKey

_LENGTH = 64


def models(bench: Bench) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        where = _make(Path(folder) / "model", bench)
        yield from _calibrations(where, bench)
        yield from _tunings(where, Path(folder) / "out", bench)
        yield from _evaluations(where, bench)


def _make(path: Path, bench: Bench) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import save_tokenizer

    torch.manual_seed(0)
    width = bench.size(1024, 64)
    config = LlamaConfig(
        vocab_size=bench.size(32000, 256), hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 32,
        num_hidden_layers=bench.size(4, 1), num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=512,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path)
    return str(path)


def _windows(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, (count, _LENGTH))


def _equal(one: Payload, other: Payload) -> bool:
    return all(torch.equal(to_tensor(a), to_tensor(b)) for a, b in zip(one.parts, other.parts, strict=True))


def _calibrations(where: str, bench: Bench) -> Iterator[Finding]:
    key, source = ModelKey(where, "auto", 1), open_checkpoint(where)
    infos = [info for name, info in source.tensors.items() if "_proj" in name and "layers.0." in name]
    names = [info.name for info in infos]
    found: list[Payload] = []
    job = GatherHessians(key, (tuple(names),), _windows(4), 0, 0)
    gather = lambda: found.extend(Worker(1, bench.device).run(job).payloads)  # noqa: E731
    peak = bench.peak(gather)
    gather()
    equal = _equal(*found)
    yield Finding("calibration twice", "equal" if equal else "unlike", ok=equal)
    if bench.on_gpu:
        share = peak / calibration_device_bytes(source, _LENGTH, hessian_bytes(map(whole_matrix, infos)), "auto")
        yield Finding("memory of a calibration over the estimate", share, "×", share <= 1)


def _tunings(where: str, out: Path, bench: Bench) -> Iterator[Finding]:
    from jobs.cli import main

    how = ["--local", "--gpus-per-worker", "0", "--projectors", "q,down", "--clusters", "8", "--rank", "2"]
    assert main(["compress", where, str(out), *how]) == 0
    key, found = TuneKey(where, str(out), "auto"), []
    for _ in range(2):
        worker = Worker(1, bench.device)
        gradients = worker.run(TuneGradients(key, 0, _windows(2)))
        (state,) = worker.run(TuneStep(key, 1, 1e-3), *gradients.payloads).payloads
        found.append((gradients.value, state))
        del worker
    equal = found[0][0] == found[1][0] and _equal(found[0][1], found[1][1])
    yield Finding("tuning step twice", "equal" if equal else "unlike", ok=equal)


def _evaluations(where: str, bench: Bench) -> Iterator[Finding]:
    key, model = ModelKey(where, "float32", 2), open_model(where)
    losses: list[tuple[float, ...]] = []
    measure = lambda: losses.append(Worker(1, bench.device).run(MeasureLosses(key, _windows(4))).value.losses)  # noqa: E731
    peak = bench.peak(measure)
    wanted = Worker(1, "cpu").run(MeasureLosses(key, _windows(4))).value.losses
    gap = max(abs(a - b) for a, b in zip(losses[0], wanted, strict=True))
    yield Finding("evaluation against a CPU, largest gap of a loss", gap, "nats", gap < 1e-3)
    if bench.on_gpu:
        share = peak / evaluation_device_bytes(model, "float32", 2 * _LENGTH)
        yield Finding("memory of an evaluation over the estimate", share, "×", share <= 1)
