"""Claims that need a CUDA device; skipped without one."""

from typing import Literal

import pytest
import torch

from swsc_core import SwscSpec, decode, dequantize, encode, kmeans, quantize, truncated_svd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def weight_of(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n // 8, n, generator=generator)[torch.randint(n // 8, (n,), generator=generator)]
    return shared + 0.5 * torch.randn(n, n, generator=generator)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("size", [256, 2048])
def test_the_same_bytes_each_time(axis: Literal["output", "input"], size: int) -> None:
    weight = weight_of(size).cuda().bfloat16()
    one, other = (encode(weight, [SwscSpec(size // 16, 32, axis)], name="w") for _ in range(2))
    assert all(torch.equal(one.tensors[part], other.tensors[part]) for part in one.tensors)


def test_a_gpu_compresses_as_well_as_a_cpu_and_either_restores_the_other() -> None:
    weight, spec = weight_of(2048).bfloat16(), SwscSpec(128, 64)
    cpu, cuda = encode(weight, [spec]), encode(weight.cuda(), [spec])
    assert cuda.relative_error == pytest.approx(cpu.relative_error, rel=0.01)
    there = decode({part: tensor.cuda() for part, tensor in cpu.tensors.items()}, cpu.entry).cpu()
    assert float((there.float() - cpu.restored.float()).abs().max()) < 0.05


def test_kmeans_and_svd_meet_the_bounds_of_the_cpu() -> None:
    points = weight_of(1024)
    ours, theirs = kmeans(points.cuda(), 64), kmeans(points, 64)
    assert ours.inertia <= 1.01 * theirs.inertia
    error = points.cuda() - ours.centroids[ours.labels]
    low_rank = truncated_svd(error, 50)
    optimum = float(torch.linalg.svdvals(error.double())[50:].square().sum())
    assert float((error - low_rank.left @ low_rank.right).square().sum()) <= 1.001 * optimum


def test_rtn_gives_the_same_codes_as_on_the_cpu() -> None:
    weight = weight_of(256)
    assert torch.equal(dequantize(quantize(weight.cuda(), 3)).cpu(), dequantize(quantize(weight, 3)))
