"""Which layers of a model have to be dense, found in the source of its classes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swsc_core.hf.dense_layers import DenseLayers


def by_name(x: Tensor, layer: nn.Linear) -> Tensor:
    return helper(x, layer)


def helper(x: Tensor, inner: nn.Linear) -> Tensor:
    return x @ inner.weight.T


class Module(nn.Module):
    """A module whose attributes mypy does not judge."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Block(Module):
    """`plain` is called; each of the others is used in one more way."""

    def __init__(self) -> None:
        super().__init__()
        names = "plain called bias_alone shape_alone device_alone product alias either through_getattr helped"
        for name in f"{names} method_helped handed dtype_alone off on other_object looked_at stored".split():
            self.add_module(name, nn.Linear(4, 4))
        self.several: Any = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.numbered: Any = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.slices = 1
        self.kept: dict[str, nn.Module] = {}
        nn.init.ones_(self.plain.weight)  # before there are weights

    def forward(self, x: Tensor, external: Any) -> Tensor:
        x = self.plain(x) + self.called.forward(x) + self.bias_alone.bias * self.bias_alone.out_features
        x = x.to(self.device_alone.weight.device, self.dtype_alone.weight.dtype)
        x = F.linear(x, self.product.weight) * self.shape_alone.weight.shape[0]
        alias = self.alias
        x = x @ alias.weight + self.through_getattr.weight
        x = x @ (self.either if self.slices else self.product).weight
        for number, layer in enumerate(self.several):
            x = layer.weight @ x + number
        x = x @ self.numbered[0].weight
        x = by_name(x, self.helped) + self.inside(x, self.method_helped) + external(x, self.handed)
        if self.slices > 1:
            x = x @ self.off.weight
        if self.slices == 1:
            x = x @ self.on.weight
        if isinstance(self.looked_at, nn.Linear) and self.looked_at is not None:
            x = self.looked_at(x)
        self.kept["stored"] = self.stored
        return x @ external.other_object.weight

    def inside(self, x: Tensor, layer: nn.Linear) -> Tensor:
        w = layer.weight
        return x @ w

    def _init_weights(self, module: nn.Module) -> None:
        nn.init.zeros_(self.plain.weight)


class Model(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.blocks: Any = nn.ModuleList([Block()])

    def get_input_embeddings(self) -> Any:
        return self.embed

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.embed(ids), None))


class TiedByHand(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.blocks[0](self.embed(ids), None), self.get_input_embeddings().weight)


class OverBlocks(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.head(self.embed(ids))
        for block in self.blocks:
            x = x @ block.plain.weight
        return x


ANY = [
    "shape_alone",
    "product",
    "alias",
    "either",
    "through_getattr",
    "helped",
    "method_helped",
    "handed",
    "on",
    "other_object",
]
ANY += ["stored", "several.0", "several.1", "numbered.0", "numbered.1"]
CALLED = ["plain", "called", "bias_alone", "device_alone", "dtype_alone", "off", "looked_at"]


@pytest.mark.parametrize("name", ANY)
def test_a_layer_whose_weight_is_used_otherwise_has_to_be_dense(name: str) -> None:
    assert "Block reads" in str(DenseLayers(Model()).reason(f"blocks.0.{name}", floats=True))


@pytest.mark.parametrize("name", CALLED)
def test_one_that_is_called_does_not(name: str) -> None:
    assert DenseLayers(Model()).reason(f"blocks.0.{name}", floats=True) is None


def test_packed_bytes_have_no_dtype_to_be_read() -> None:
    layers = DenseLayers(Model())
    assert layers.reason("blocks.0.dtype_alone", floats=False)
    assert layers.reason("blocks.0.device_alone", floats=False) is None


def test_a_condition_on_settings_is_looked_up() -> None:
    model = Model()
    model.blocks[0].slices = 2
    assert DenseLayers(model).reason("blocks.0.off", floats=True)
    assert DenseLayers(model).reason("blocks.0.on", floats=True) is None


def test_embeddings_that_serve_as_a_head_have_to_be_dense() -> None:
    assert DenseLayers(TiedByHand()).reason("embed", floats=True)
    assert DenseLayers(TiedByHand()).reason("head", floats=True) is None
    assert DenseLayers(Model()).reason("embed", floats=True) is None


def test_readers_further_up_are_found() -> None:
    assert "OverBlocks reads blocks.*.plain.weight" in str(
        DenseLayers(OverBlocks()).reason("blocks.0.plain", floats=True)
    )


def test_a_parameter_of_two_layers_has_to_be_dense_unless_they_are_known_to_be_tied() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    assert "shares" in str(DenseLayers(model).reason("embed", floats=True))
    assert DenseLayers(model).reason("embed", floats=True, tied=frozenset({"embed.weight", "head.weight"})) is None


def test_so_has_a_layer_that_two_modules_hold() -> None:
    model = Model()
    model.again = model.blocks[0].plain
    assert "shares" in str(DenseLayers(model).reason("blocks.0.plain", floats=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
        lambda layer: torch.nn.utils.parametrizations.orthogonal(layer),
        lambda layer: setattr(layer, "forward", lambda x: x),
        lambda layer: layer.register_parameter("temperature", nn.Parameter(torch.ones(1))),
    ],
    ids=["hook", "pre-hook", "weight norm", "orthogonal", "own forward", "further parameter"],
)
def test_a_layer_that_was_changed_has_to_be_dense(change: Callable[[nn.Module], object]) -> None:
    model = Model()
    change(model.blocks[0].plain)
    assert DenseLayers(model).reason("blocks.0.plain", floats=True)


def test_without_source_everything_below_has_to_be_dense() -> None:
    space: dict[str, type] = {}
    exec("class Hidden(torch.nn.Module):\n    def forward(self, x): return self.inner(x)", {"torch": torch}, space)
    model = Model()
    hidden: Any = space["Hidden"]()
    model.hidden = hidden
    hidden.inner = nn.Linear(4, 4)
    assert "Hidden" in str(DenseLayers(model).reason("hidden.inner", floats=True))


def test_fast_paths_of_torch_are_read_as_well() -> None:
    model = Model()
    model.layer = nn.TransformerEncoderLayer(4, 2)
    assert "TransformerEncoderLayer reads linear1.weight" in str(
        DenseLayers(model).reason("layer.linear1", floats=True)
    )
