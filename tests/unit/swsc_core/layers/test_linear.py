"""Layers that work from the stored parts give what the dense weight gives."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from swsc_core import Encoded, RtnSpec, SwscEmbedding, SwscLinear, SwscSpec, encode
from swsc_core.compressed import matmul as product_module
from swsc_core.method.spec import Spec

SPECS: dict[str, Spec] = {
    "paper, output channels": SwscSpec(9, 4),
    "paper, input channels": SwscSpec(9, 4, "input"),
    "clusters alone": SwscSpec(9, 0),
    "compensation alone": SwscSpec(0, 5),
    "neither": SwscSpec(0, 0),
    "one centroid": SwscSpec(1, 2),
    "segments": SwscSpec(16, 0, segment_size=4, scaled=True),
    "segments of input channels": SwscSpec(13, 3, "input", segment_size=5, scaled=True),
    "codebooks": SwscSpec(7, 2, segment_size=6, codebooks=4, scaled=True),
    "codebooks of whole channels": SwscSpec(3, 2, codebooks=4),
    "few bits": SwscSpec(16, 3, segment_size=8, centroid_bits=8, factor_bits=6, scaled=True),
    "rtn, groups": RtnSpec(3, "group", 16),
    "rtn, one scale": RtnSpec(4, "tensor", symmetric=True),
}
M, N = 40, 48


def dense(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(N, M, bias=bias)


@cache
def encoded(name: str) -> Encoded:
    """The weight of `dense()`; read only."""
    return encode(dense().weight.detach(), [SPECS[name]])


@cache
def _compressed(name: str, bias: bool) -> SwscLinear:
    return SwscLinear.from_linear(dense(bias=bias), SPECS[name])


def compressed(name: str, bias: bool = True) -> SwscLinear:
    """A layer of the test's own; fitting one takes much longer than copying it."""
    return copy.deepcopy(_compressed(name, bias))


@pytest.fixture(params=SPECS, ids=list(SPECS))
def layer(request: pytest.FixtureRequest) -> SwscLinear:
    return compressed(request.param)


def expected(layer: SwscLinear, x: Tensor) -> Tensor:
    """By the dense weight in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    return linear(x.double(), layer.dense_weight().double(), bias)


def relative(found: Tensor, reference: Tensor) -> float:
    found, reference = found.detach().double(), reference.detach().double()
    return float((found - reference).norm() / reference.norm())


def test_the_output_is_that_of_the_dense_weight(layer: SwscLinear) -> None:
    x = torch.randn(2, 3, N)
    assert relative(layer(x), expected(layer, x)) < 1e-6


def test_slabs_of_any_size_give_the_same(layer: SwscLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, N)
    whole = layer(x)
    monkeypatch.setattr(product_module, "_SLAB", 1)
    assert relative(layer(x), whole) < 1e-6


def test_the_same_input_gives_the_same_bits(layer: SwscLinear) -> None:
    x = torch.randn(7, N)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_a_dense_layer_is(layer: SwscLinear, dtype: torch.dtype) -> None:
    assert layer.bias is not None
    x = torch.randn(16, N)
    dense_layer = linear(x.to(dtype), layer.dense_weight().to(dtype), layer.bias.to(dtype))
    ours = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert ours.dtype == dtype
    assert relative(ours, expected(layer, x)) < 2.5 * relative(dense_layer, expected(layer, x)) + 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_the_output_has_the_dtype_of_the_input_whatever_that_of_the_parts(name: str, bias: bool) -> None:
    layer, x = compressed(name, bias), torch.randn(16, N)
    for dtype, most in ((torch.float64, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 3e-3)):
        found, reference = layer(x.to(dtype)), expected(layer, x)
        assert found.dtype == dtype
        assert relative(found, reference) < most or not reference.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_under_autocast_it_gives_the_dtype_that_a_dense_layer_gives(name: str, bias: bool, dtype: torch.dtype) -> None:
    layer, x = compressed(name, bias).to(dtype), torch.randn(4, N, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dense(bias=bias).to(dtype)(x).dtype == torch.bfloat16


def test_autocast_casts_the_products(layer: SwscLinear) -> None:
    x = torch.randn(4, N)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert relative(y, expected(layer, x)) < 0.02


def test_gradients_of_inputs_are_those_of_the_dense_weight(layer: SwscLinear) -> None:
    x = torch.randn(6, N, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    reference = torch.ones(6, M).double() @ layer.dense_weight().double()
    if reference.any():
        assert x.grad is not None
        assert relative(x.grad, reference) < 1e-5
    else:
        assert x.grad is None or not x.grad.any()


def test_the_graph_of_segments_does_not_hold_the_dense_weight() -> None:
    layer = compressed("segments")
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(2, N, requires_grad=True))
    assert max(kept) < M * N


@pytest.mark.parametrize("name", ["paper, output channels", "paper, input channels", "segments", "codebooks"])
def test_parts_that_are_asked_to_can_be_tuned(name: str) -> None:
    layer = compressed(name)
    tuned = [
        part for part in ("weight", "scales", "left", "right") if part in layer.parts and layer.parts[part].numel()
    ]
    for part in tuned:
        layer.parts[part].requires_grad_()
    x = torch.randn(6, N, dtype=torch.float64)

    def loss(*values: Tensor) -> Tensor:
        swapped: dict[str, Tensor] = dict(zip(tuned, values, strict=True))
        return torch.func.functional_call(layer.double(), swapped, (x,)).square().sum()

    values = [layer.parts[part].detach().double().requires_grad_() for part in tuned]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_only_the_bias_requires_a_gradient_by_default(layer: SwscLinear) -> None:
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


@pytest.mark.parametrize("name", SPECS)
def test_the_state_dict_is_what_is_stored(name: str) -> None:
    layer, stored = compressed(name), encoded(name).tensors
    assert layer.entry == encoded(name).entry
    state = layer.state_dict()
    assert state.keys() == {*stored, "bias"}
    assert all(torch.equal(state[part], tensor) for part, tensor in stored.items())


def whole_graphs(layer: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (torch.randn(3, N),)).module()
    return [compiled, exported]


@pytest.mark.parametrize(
    "name", ["paper, output channels", "paper, input channels", "segments", "few bits", "rtn, groups"]
)
def test_it_compiles_and_exports_as_one_graph(name: str) -> None:
    layer = compressed(name)
    x = torch.randn(3, N)
    with torch.no_grad():
        for graph in whole_graphs(layer):
            assert relative(graph(x), layer(x)) < 1e-6


@pytest.mark.parametrize("name", SPECS)
def test_one_compiled_graph_serves_any_number_of_tokens(name: str) -> None:
    """Engines compile once, with the number of tokens unknown, and refuse a graph that fixes it."""
    torch.compiler.reset()
    layer, rows = compressed(name), SwscEmbedding(encoded(name).entry)
    rows.load_state_dict(encoded(name).tensors)
    for module, tokens in ((layer, lambda count: torch.randn(count, N)), (rows, lambda count: torch.arange(count) % M)):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        with torch.no_grad():
            for count in (5, 19, 64):
                x = tokens(count)
                torch._dynamo.mark_dynamic(x, 0)
                assert relative(compiled(x), module(x)) < 1e-6 or not module(x).any()


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, M - 1), min_size=1, max_size=12), name=st.sampled_from(sorted(SPECS)))
def test_rows_of_an_embedding_are_those_of_the_dense_weight(ids: list[int], name: str) -> None:
    layer = SwscEmbedding(encoded(name).entry, scale=2.0)
    layer.load_state_dict(encoded(name).tensors)
    reference = embedding(torch.tensor([ids]), encoded(name).restored) * 2.0
    assert torch.allclose(layer(torch.tensor([ids])), reference, atol=1e-6)


def test_what_the_layer_holds_is_what_is_stored() -> None:
    layer = compressed("segments", bias=False)
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert held == SPECS["segments"].stored_bytes((M, N), 32)


@pytest.mark.parametrize(("part", "damage"), [("labels", lambda t: t[:-1]), ("weight", lambda t: t[:, :-1])])
def test_parts_of_another_shape_are_refused_by_name(part: str, damage: Callable[[Tensor], Tensor]) -> None:
    layer = compressed("segments")
    setattr(layer, part, nn.Parameter(damage(layer.parts[part]), requires_grad=False))
    with pytest.raises(ValueError, match=part):
        layer.dense_weight()


def test_a_label_beyond_the_centroids_is_refused() -> None:
    layer = compressed("paper, output channels")
    layer.parts["labels"].data.fill_(255)
    with pytest.raises(ValueError, match="label 15 is out of range for 9 centroids"):
        layer.dense_weight()
