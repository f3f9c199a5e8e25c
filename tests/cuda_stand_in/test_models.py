"""Calibration, tuning and evaluation of tiny models by the rules of CUDA, through the worker's own methods."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from jobs.cli import main
from pipeline.calibration.job import GatherHessians, GenerateText
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import to_tensor
from pipeline.compression.job import CompressionVariant, CompressVariants
from pipeline.engine.worker import Worker
from pipeline.errors import ClusterError
from pipeline.evaluation.job import MeasureLosses
from pipeline.models.loading import ModelKey
from pipeline.models.matrices import find_matrix
from pipeline.outputs.report_rows import MatrixResult
from pipeline.tuning.job import MeasureDivergence, TuneGradients, TuneStep
from pipeline.tuning.tuner import TuneKey
from swsc_core import RtnSpec, SwscSpec
from tests.cuda_stand_in.device import StandIn
from tests.support.tiny import save_tokenizer

LENGTH = 24
_SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_SMALL, num_key_value_heads=1, intermediate_size=48, tie_word_embeddings=True)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SMALL, num_key_value_heads=1, intermediate_size=48, num_local_experts=2, num_experts_per_tok=1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_head=2, n_layer=1, n_positions=64)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=256, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    ),
}  # fmt: skip
MATRICES = {
    "llama": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ],
    "mixtral": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
    ],
    "gpt2": ["transformer.h.0.attn.c_attn.q.weight", "transformer.h.0.mlp.c_fc.weight"],
    "opt": ["model.decoder.layers.0.self_attn.q_proj.weight"],  # it counts positions in floating point values
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("models") / name
        build().to(torch.bfloat16).save_pretrained(made[name])
        save_tokenizer(made[name])
    return made


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    with StandIn() as device:
        yield device


def windows(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, (count, LENGTH))


def calibrated(model: Path, family: str, dtype: str = "auto") -> dict[str, torch.Tensor]:
    """Sums of a fresh worker, by part."""
    key = ModelKey(str(model), dtype, 1)
    (payload,) = Worker(1, "cuda").run(GatherHessians(key, (tuple(MATRICES[family]),), windows(), 0, 7)).payloads
    return {part.name: to_tensor(part) for part in payload.parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_calibrations_give_the_same_bits_and_no_sum_lacks_an_order(
    family: str, models: dict[str, Path], gpu: StandIn
) -> None:
    one, other = (calibrated(models[family], family) for _ in range(2))
    assert not gpu.counts.unordered
    assert one.keys() == other.keys()
    assert all(torch.equal(one[part], other[part]) for part in one)
    assert all(float(one[part].abs().sum()) > 0 for part in one if part.endswith("rows"))


def test_a_calibration_is_that_of_a_cpu(models: dict[str, Path]) -> None:
    """But for the last bits: other kernels of attention."""
    key = ModelKey(str(models["llama"]), "float32", 1)
    (payload,) = Worker(1, "cpu").run(GatherHessians(key, (tuple(MATRICES["llama"]),), windows(), 0, 7)).payloads
    with StandIn():
        here = calibrated(models["llama"], "llama", "float32")
    for part in payload.parts:
        torch.testing.assert_close(here[part.name], to_tensor(part), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation(family: str, models: dict[str, Path], gpu: StandIn) -> None:
    key = ModelKey(str(models[family]), "float32", 2)
    found = Worker(1, "cuda").run(MeasureLosses(key, windows())).value
    assert not gpu.counts.unordered
    with _outside(gpu):
        expected = Worker(1, "cpu").run(MeasureLosses(key, windows())).value
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


class _outside:
    """What is done on the CPU, beside."""

    def __init__(self, device: StandIn) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._device.__exit__(None, None, None)

    def __exit__(self, *_: object) -> None:
        self._device.__enter__()


def test_units_of_a_sweep_are_compressed_and_measured(models: dict[str, Path], gpu: StandIn) -> None:
    source, name = open_checkpoint(str(models["llama"])), MATRICES["llama"][0]
    worker = Worker(1, "cuda")
    variants = CompressionVariant((SwscSpec(4, 2, n_init=1),), 0), CompressionVariant((RtnSpec(3),), 0)
    output = worker.run(CompressVariants(source.store, find_matrix(source, name), variants))
    assert all(isinstance(result, MatrixResult) for result in output.value)
    key = ModelKey(str(models["llama"]), "float32", 1)
    plain = worker.run(MeasureLosses(key, windows(1))).value.losses
    swapped = [
        worker.run(MeasureLosses(key, windows(1), str(i), (name,)), payload).value.losses
        for i, payload in enumerate(output.payloads)
    ]
    assert len({plain, *swapped}) == 3
    assert worker.run(MeasureLosses(key, windows(1))).value.losses == plain
    assert not gpu.counts.unordered


def test_what_a_model_writes_itself(models: dict[str, Path], gpu: StandIn) -> None:
    key = ModelKey(str(models["llama"]), "auto", 1)
    one, other = (Worker(1, "cuda").run(GenerateText(key, 2, 6, 0, 3, np.array([1]))).value for _ in range(2))
    assert np.array_equal(one, other)
    assert one.shape == (2, 6)
    assert not gpu.counts.unordered


@pytest.mark.parametrize(("family", "roles"), [("llama", "q,down"), ("mixtral", "q,experts")])
def test_tuning(family: str, roles: str, models: dict[str, Path], tmp_path: Path) -> None:
    out, how = tmp_path / "out", ["--projectors", roles, "--clusters", "2", "--rank", "2"]
    assert main(["compress", str(models[family]), str(out), "--local", *how]) == 0
    key = TuneKey(str(models[family]), str(out), "auto")
    with StandIn() as gpu:
        found = []
        for _ in range(2):
            worker = Worker(1, "cuda")
            gradients = worker.run(TuneGradients(key, 0, windows(1)))
            (state,) = worker.run(TuneStep(key, 1, 1e-3), *gradients.payloads).payloads
            after = worker.run(MeasureDivergence(key, 1, windows(1)), state).value
            found.append((gradients.value, [to_tensor(part) for part in state.parts], after))
        assert not gpu.counts.unordered
    (about, one, after), (again, other, _) = found
    assert about == again
    assert after.divergence < about.divergence
    assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def test_tf32_that_was_switched_on_is_switched_off(models: dict[str, Path], gpu: StandIn) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        Worker(1, "cuda")
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_tf32_that_cannot_be_switched_off_is_refused(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(ClusterError, match="NVIDIA_TF32_OVERRIDE"):
        Worker(1, "cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr("tests.cuda_stand_in.device._tf32", lambda: True)  # by whatever else there may be
    with pytest.raises(ClusterError, match="TF32"):
        Worker(1, "cuda")


def test_without_the_guard_gradients_of_attention_have_no_order(
    models: dict[str, Path], gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in sees what the guard is for."""
    from contextlib import nullcontext

    monkeypatch.setattr("pipeline.calibration.gather.deterministic", lambda device: nullcontext())
    calibrated(models["llama"], "llama")
    assert any("attention" in line for line in gpu.counts.unordered)
