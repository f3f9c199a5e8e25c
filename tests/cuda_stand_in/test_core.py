"""Every numerical function of the core, forward and backward, by the rules of CUDA.

No mix of devices, no sum without an order.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from swsc_core import SwscSpec, decode, dequantize, encode, kmeans, quantize, truncated_svd
from swsc_core.allocation.sensitivity import relative_distortion, sensitivity
from swsc_core.compressed.codec import Encoded
from swsc_core.compressed.registry import matrix_of
from swsc_core.finetune import AdamState, adam_step, step_unit, tunable_values
from swsc_core.layers.linear import SwscEmbedding, SwscJoined, SwscLinear
from swsc_core.method.codebook_fit import CodebookFit
from swsc_core.method.compress import compress
from swsc_core.method.metric import Metric
from swsc_core.method.rtn import Granularity
from swsc_core.method.spec import RtnSpec
from swsc_core.storage.location import MatrixLocation
from swsc_core.storage.row_blocks import RowBlocks, fuse_rows
from tests.cuda_stand_in.device import CUDA, CudaTensor, MixError, OrderError, StandIn


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with StandIn() as device:
        yield device
    torch.set_num_threads(threads)


def weight(m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, n).to(dtype).to("cuda")


def hessian(n: int) -> Tensor:
    x = torch.randn(4 * n, n)
    return (x.T @ x / len(x)).to("cuda")


def metric(m: int, n: int) -> Metric:
    return Metric(hessian(n), (torch.rand(m) + 0.1).to("cuda"), tokens=4 * n)


Q = MatrixLocation("qkv.weight", row_blocks=RowBlocks(0, 32, 32, 1))
BEST = SwscSpec(16, 0, segment_size=4, scaled=True, metric="activations", feedback=True, rounds=2, centroid_bits=8)


@cache
def paper(axis: Any = "output") -> Encoded:
    return encode(weight(48, 40, torch.bfloat16), [SwscSpec(4, 4, axis, n_init=2)], name="w")


@cache
def best(axis: Any = "output", rank: int = 0, m: int = 64, n: int = 64) -> Encoded:
    spec = replace(BEST, channel_axis=axis, rank=rank, factor_bits=8 if rank else None)
    return encode(weight(m, n, torch.bfloat16), [spec], name="w", metric=metric(m, n))


@cache
def plain(axis: Any = "output", rank: int = 4) -> Encoded:
    """Segments whose values are floating point ones: they can be fine-tuned."""
    spec = SwscSpec(8, rank, axis, segment_size=4, rounds=1, scaled=True, codebooks=2)
    return encode(weight(64, 64), [spec], name="w")


def layer_of(made: Any, encoded: Encoded) -> Any:
    made.load_state_dict(dict(encoded.tensors), assign=True)
    return made


def linear(encoded: Encoded, dtype: torch.dtype = torch.bfloat16, train: bool = False) -> Tensor:
    layer = layer_of(SwscLinear(encoded.entry, False, dtype, "meta"), encoded)
    x = torch.randn(3, encoded.entry.shape[1], dtype=dtype).to("cuda")
    if not train:
        return layer(x)
    x.requires_grad_()
    for part in layer.parameters():
        part.requires_grad_(part.is_floating_point())
    y = layer(x)
    y.float().square().sum().backward()
    assert isinstance(x.grad, CudaTensor)
    grads = [part.grad for part in layer.parameters() if part.requires_grad]
    assert grads
    assert all(isinstance(grad, CudaTensor) for grad in grads)
    return y


def embedding(encoded: Encoded, train: bool = False) -> Tensor:
    layer = layer_of(SwscEmbedding(encoded.entry, 1.0, torch.float32, "meta"), encoded)
    for part in layer.parameters():
        part.requires_grad_(train and part.is_floating_point())
    y = layer(torch.randint(0, encoded.entry.shape[0], (2, 5)).to("cuda"))
    if train:
        y.square().sum().backward()
        assert any(isinstance(part.grad, CudaTensor) for part in layer.parameters())
    return y


def fused(train: bool = False) -> Tensor:
    encoded = best(m=32)
    layer = SwscJoined({"q": replace(encoded.entry, location=Q)}, 16, dtype=torch.bfloat16, device="meta")
    layer_of(layer.q, encoded)
    layer.weight = torch.nn.Parameter(weight(16, 64, torch.bfloat16), requires_grad=train)
    y = layer(weight(3, 64, torch.bfloat16))
    if train:
        y.float().square().sum().backward()
        assert isinstance(layer.weight.grad, CudaTensor)
    return y


def tuning() -> dict[str, Tensor]:
    encoded = plain()
    tunable = matrix_of(encoded.tensors, encoded.entry).tunable()
    values = tunable.rounded(tunable_values(tunable.matrix))
    tunable.restored(values)
    gradients = tunable.gradients(values, weight(64, 64))
    for name, value in values.items():
        zeros = torch.zeros_like(value)
        values[name] = adam_step(AdamState(value, zeros, zeros), gradients[name], step_unit(name, value), 1, 1e-3).value
    tunable.stored(values)
    return values


def pieces() -> Tensor:
    rows, matrix = RowBlocks(0, 4, 8, 4), weight(32, 8)
    piece = rows.take(matrix)
    rows.put(matrix, piece)
    return fuse_rows(weight(16, 8), [rows], [piece])


def restored(encoded: Encoded) -> Tensor:
    matrix = matrix_of(encoded.tensors, encoded.entry)
    matrix.restore_rows(torch.tensor([1, 5, 5, 0], device="cuda"))
    return matrix.restore()


CASES: dict[str, Callable[[], Any]] = {
    "kmeans, Gram": lambda: kmeans(weight(64, 1024), 6, n_init=2),
    "kmeans, GEMM": lambda: kmeans(weight(200, 8), 6, n_init=2),
    "svd, exact": lambda: truncated_svd(weight(40, 60), 8),
    "svd, Krylov": lambda: truncated_svd(weight(1030, 1030), 8, tolerance=0.5),
    "paper, output": lambda: decode((e := paper.__wrapped__()).tensors, e.entry),
    "paper, input": lambda: paper.__wrapped__("input"),
    "compress": lambda: compress(weight(64, 64), SwscSpec(4, 4, n_init=2)),
    "best, output": best.__wrapped__,
    "best, input": lambda: best.__wrapped__("input"),
    "best, rank": lambda: decode((e := best.__wrapped__(rank=4)).tensors, e.entry),
    "segments, plain": lambda: restored(plain()),
    "segments, input": lambda: restored(plain("input")),
    "linear, paper, output": lambda: linear(paper()),
    "linear, paper, input": lambda: linear(paper("input")),
    "linear, best": lambda: linear(best(rank=4)),
    "linear, rounded to nearest": lambda: linear(encode(weight(64, 64, torch.bfloat16), [RtnSpec(3)])),
    "embedding": lambda: embedding(best()),
    "embedding, input": lambda: embedding(plain("input")),
    "fused": fused,
    "tuning": tuning,
    "rtn, tensor": lambda: dequantize(quantize(weight(64, 64), 3, granularity="tensor")),
    "rtn, group": lambda: dequantize(quantize(weight(64, 96), 3, granularity="group", group_size=32, symmetric=True)),
    "fp8": lambda: encode(
        weight(64, 64, torch.float8_e4m3fn), [SwscSpec(4, 4, n_init=2)], storage_dtype=torch.bfloat16
    ),
    "reach": lambda: sensitivity(weight(32, 64), metric(32, 64)),
    "share": lambda: relative_distortion(weight(64, 64), BEST, metric(64, 64), 0, "w"),
    "pieces": pieces,
    "linear, paper, output, backward": lambda: linear(paper(), train=True),
    "linear, paper, input, backward": lambda: linear(paper("input"), train=True),
    "linear, segments, backward": lambda: linear(plain(), torch.float32, train=True),
    "linear, segments of columns, backward": lambda: linear(plain("input"), torch.float32, train=True),
    "embedding, backward": lambda: embedding(plain(), train=True),
    "embedding of columns, backward": lambda: embedding(plain("input"), train=True),
    "fused, backward": lambda: fused(train=True),
}


@pytest.mark.parametrize("case", CASES)
def test_it_keeps_the_rules_of_cuda(case: str, gpu: StandIn) -> None:
    CASES[case]()
    assert sum(gpu.counts.launches.values())
    assert not gpu.counts.unordered


@pytest.mark.parametrize("made", [best, paper], ids=["best", "paper"])
def test_twice_the_same_bytes(made: Any, gpu: StandIn) -> None:
    torch.manual_seed(1)
    one = made.__wrapped__()
    torch.manual_seed(1)
    other = made.__wrapped__()
    assert all(torch.equal(one.tensors[part], other.tensors[part]) for part in one.tensors)
    assert one.tensors["labels"].device == CUDA


def test_the_same_matrix_is_as_near_as_on_a_cpu(gpu: StandIn) -> None:
    dense, h, rows = torch.randn(64, 64), hessian(64).cpu(), torch.rand(64) + 0.1
    here = encode(dense, [BEST], name="w", metric=Metric(h.clone(), rows.clone(), tokens=256))
    there = encode(dense.to("cuda"), [BEST], name="w", metric=Metric(h.to("cuda"), rows.to("cuda"), tokens=256))
    assert there.relative_error == pytest.approx(here.relative_error, rel=0.01)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_rounding_to_nearest_gives_the_bytes_of_a_cpu(granularity: Granularity, gpu: StandIn) -> None:
    dense = torch.randn(64, 96)
    here, there = (quantize(w, 3, granularity=granularity, group_size=32) for w in (dense, dense.to("cuda")))
    for part in ("codes", "scales", "zero_points"):
        assert torch.equal(getattr(there, part).cpu(), getattr(here, part)), part


# launches of one block of columns: a new one is a new wait for the host in every block of every matrix
ASSIGN, REASSIGN = 22.2, 22.7
LOOP = (
    "_assign_with_feedback", "_descend", "assign_block", "_nearest", "nearest", "clustered", "unscaled",
    "_centroid_indices",
)  # fmt: skip


@pytest.mark.parametrize("n", [64, 128])
def test_no_wait_in_the_loop_over_columns_and_few_launches(n: int, gpu: StandIn) -> None:
    target = weight(64, n)
    fit = CodebookFit(target, metric(64, n), BEST, torch.bfloat16)
    fit.start(target, torch.Generator().manual_seed(0))
    _ = fit.metric.root
    for step, most in ((partial(fit.assign, feedback=True), ASSIGN), (fit.reassign, REASSIGN)):
        with gpu.counted() as counts:
            step(target)
        launches, waits = counts.at(*LOOP)
        assert waits == 0, counts.waits
        assert launches / (n / 4) <= most, counts.launches
        assert sum(counts.waits.values()) <= 2, counts.waits  # a check of the blocks' roots, and what changed


def test_layers_copy_nothing_from_the_host_once_they_have_run(gpu: StandIn) -> None:
    encoded = best(m=32)
    layer = SwscJoined({"q": replace(encoded.entry, location=Q)}, 16, dtype=torch.bfloat16, device="meta")
    layer_of(layer.q, encoded)
    layer.weight = torch.nn.Parameter(weight(16, 64, torch.bfloat16), requires_grad=False)
    x = weight(3, 64, torch.bfloat16)
    with torch.inference_mode():
        layer(x)
    with gpu.counted() as counts:
        layer(x.requires_grad_()).float().sum().backward()
    assert not counts.waits


class TestTheStandIn:
    """It refuses what CUDA refuses, or the tests above mean nothing."""

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x: x + torch.ones(4, 4),
            lambda x: torch.cat([x, torch.ones(4, 4)]),
            lambda x: torch.ones(4, 4)[x.long()[0]],
            lambda x: torch.ones(4, 4) @ x,
            lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1, 4)),
            lambda x: torch.randint(3, (2,), generator=torch.Generator(), device="cuda"),
            lambda x: torch.multinomial(x.abs(), 1, generator=torch.Generator()),
            lambda x: torch.where(x > 0, x, torch.zeros(4, 4)),
        ],
    )
    def test_devices_do_not_mix(self, wrong: Callable[[Tensor], Any], gpu: StandIn) -> None:
        with pytest.raises(MixError):
            wrong(weight(4, 4))

    def test_numbers_without_dimensions_and_indices_on_the_host_are_taken(self, gpu: StandIn) -> None:
        x = weight(4, 4)
        assert (x * torch.tensor(2.0)).device == CUDA
        assert x[torch.tensor([0, 2])].shape == (2, 4)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()

    @pytest.mark.parametrize(
        ("waits", "call"),
        [
            (1, lambda x: float(x.sum())),
            (1, lambda x: x.cpu()),
            (1, lambda x: x[x > 0]),
            (1, lambda x: x.nonzero()),
            (1, lambda x: x.tolist()),
            (1, lambda x: torch.tensor([1, 2], device=x.device)),
            (1, lambda x: torch.ones(3).to(x)),
            (1, lambda x: torch.bincount(x.long().abs().reshape(-1))),
            (0, lambda x: x.to("cuda")),
            (0, lambda x: x.to(torch.float64)),
            (0, lambda x: torch.zeros(3, device=x.device)),
            (0, lambda x: torch.nn.functional.one_hot(x.long().abs(), 9)),
            (0, lambda x: x.argmin(dim=0)),
        ],
    )
    def test_waits_of_the_host_are_counted(self, waits: int, call: Callable[[Tensor], Any], gpu: StandIn) -> None:
        x = weight(4, 4)
        with gpu.counted() as counts:
            call(x)
        assert sum(counts.waits.values()) == waits, counts.waits

    @pytest.mark.parametrize(
        ("unordered", "call"),
        [
            (1, lambda x: x.index_add_(0, torch.tensor([0, 0], device="cuda"), x[:2].clone())),
            (0, lambda x: x.index_add_(0, torch.tensor([0, 1], device="cuda"), x[:2].clone())),
            (1, lambda x: x.cumsum(0)),
            (0, lambda x: x.long().cumsum(0)),
            (1, lambda x: x.index_put_((torch.tensor([0, 0], device="cuda"),), x[:2].clone())),
            (1, lambda x: x.requires_grad_().index_select(0, torch.tensor([1, 1], device="cuda")).sum().backward()),
        ],
    )
    def test_sums_without_an_order_are_counted(
        self, unordered: int, call: Callable[[Tensor], Any], gpu: StandIn
    ) -> None:
        x = weight(4, 4)
        with gpu.counted() as counts:
            call(x)
        assert sum(counts.unordered.values()) == unordered

    @pytest.mark.parametrize("backend", ["flash", "math"])
    def test_fused_attention_has_no_order_backwards(self, backend: str, gpu: StandIn) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (torch.randn(1, 2, 8, 16).to("cuda").requires_grad_() for _ in range(3))
        with sdpa_kernel(SDPBackend.MATH if backend == "math" else SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        assert bool(gpu.counts.unordered) == (backend == "flash")
        assert isinstance(q.grad, CudaTensor)

    def test_what_has_no_deterministic_kernel_is_refused_where_one_is_asked_for(self, gpu: StandIn) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(OrderError):
                weight(4, 4).cumsum(0)
            weight(4, 4).index_add_(0, torch.tensor([0, 0], device="cuda"), weight(2, 4))
        finally:
            torch.use_deterministic_algorithms(False)
        assert not gpu.counts.unordered

    def test_tf32_rounds_the_factors_of_a_product(self, gpu: StandIn) -> None:
        x = (1 + 2.0**-12) * torch.eye(4).to("cuda")
        assert torch.equal(x @ torch.eye(4).to("cuda"), x)
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            assert not torch.equal(x @ torch.eye(4).to("cuda"), x)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
