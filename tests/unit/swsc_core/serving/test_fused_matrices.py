"""Matrices that fuse q, k and v, as engines split them: whole, by adjacent heads, and transposed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from swsc_core import SwscSpec, encode
from swsc_core.method.spec import Spec
from swsc_core.serving.experts import RestoredExperts
from swsc_core.storage.row_blocks import RowBlocks, remaining_rows
from tests.unit.swsc_core.serving.test_methods import (
    CODED,
    HIDDEN,
    INPUT,
    OUTPUT,
    RTN,
    SEGMENTS,
    Config,
    Linear,
    applied,
)

# pieces of four heads of 16 and two of keys and values, and how an engine's layer for them splits
SIDE_BY_SIDE = {"q": RowBlocks(0, 64, 128, 1), "k": RowBlocks(64, 32, 128, 1), "v": RowBlocks(96, 32, 128, 1)}
BY_GROUP = {"q": RowBlocks(0, 32, 64, 2), "k": RowBlocks(32, 16, 64, 2), "v": RowBlocks(48, 16, 64, 2)}
NAME = "a.query_key_value"
KINDS: dict[str, dict[str, Spec]] = {
    "all": {"q": OUTPUT, "k": OUTPUT, "v": OUTPUT},
    "all of different kinds": {"q": SEGMENTS, "k": RTN, "v": INPUT},
    "q and k": {"q": CODED, "k": OUTPUT},
    "k alone": {"k": OUTPUT},
    "v alone": {"v": SwscSpec(9, 0)},
}


class Whole:
    """A fused matrix with compressed pieces: `stored` tensors by name, `dense` the restored matrix."""

    def __init__(self, blocks: dict[str, RowBlocks], specs: dict[str, Spec], transposed: bool = False) -> None:
        torch.manual_seed(0)
        self.dense, self.blocks, self.transposed = torch.randn(128, HIDDEN), blocks, transposed
        own = [blocks[piece] for piece in specs]
        self.stored = {f"{NAME}.weight": self.dense[remaining_rows(128, own)]}
        self.entries = {}
        for piece, spec in specs.items():
            made = encode(blocks[piece].take(self.dense), [spec])
            blocks[piece].put(self.dense, made.restored)
            self.stored |= {f"{NAME}.{piece}.{part}": tensor for part, tensor in made.tensors.items()}
            rows = blocks[piece]
            self.entries[f"{NAME}.{piece}.weight"] = {
                **made.entry.to_json(), "tensor": f"{NAME}.weight",
                "rows": [rows.first, rows.length, rows.stride, rows.count],
                **({"transposed": True} if transposed else {}),
            }  # fmt: skip

    def load(self, rank: int, ranks: int, sizes: Sequence[int]) -> Any:
        """As engines do: by the names of parameters and modules; GPT-2's turns what is called weight."""
        layer = Linear(rank, ranks)
        config = Config.from_config({"format_version": 3, "tensors": self.entries})
        method = config.get_quant_method(layer, NAME)
        layer.quant_method = method
        method.create_weights(layer, HIDDEN, list(sizes), HIDDEN, 128, torch.float32)
        parameters: dict[str, Any] = dict(layer.named_parameters())
        assert parameters.keys() == {name.removeprefix(f"{NAME}.") for name in self.stored}
        for name, tensor in self.stored.items():
            parameter = parameters[name.removeprefix(f"{NAME}.")]
            parameter.weight_loader(parameter, tensor.t() if self.transposed and name.endswith(".weight") else tensor)
        method.process_weights_after_loading(layer)
        return layer


def of_rank(weight: Tensor, blocks: dict[str, RowBlocks], rank: int, ranks: int, kv: int) -> Tensor:
    """The rows of a rank: its share of the queries, and of keys and values, of which there are `kv` shares."""
    shares = {"q": (rank, ranks), "k": (rank * kv // ranks, kv), "v": (rank * kv // ranks, kv)}
    return torch.cat([rows.take(weight).chunk(shares[p][1])[shares[p][0]] for p, rows in blocks.items()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [SIDE_BY_SIDE, BY_GROUP], ids=["side by side", "by group"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_layer_of_q_k_and_v_has_the_rows_of_its_rank(
    kind: str, blocks: dict[str, RowBlocks], transposed: bool, ranks: int
) -> None:
    whole, x, kv = Whole(blocks, KINDS[kind], transposed), torch.randn(3, HIDDEN), min(ranks, 2)
    for rank in range(ranks):
        layer = whole.load(rank, ranks, [64 // ranks, 32 // kv, 32 // kv])
        assert torch.allclose(applied(layer, x), linear(x, of_rank(whole.dense, blocks, rank, ranks, kv)), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_without_heads_has_the_rows_in_their_stored_order(kind: str, ranks: int) -> None:
    whole, x, bias = Whole(BY_GROUP, KINDS[kind]), torch.randn(3, HIDDEN), torch.randn(128 // ranks)
    for rank in range(ranks):
        layer = whole.load(rank, ranks, [128 // ranks])
        expected = linear(x, whole.dense.chunk(ranks)[rank], bias)
        assert torch.allclose(applied(layer, x, bias), expected, atol=1e-4)


def test_whole_output_channels_of_pieces_are_one_product() -> None:
    (together,) = Whole(BY_GROUP, KINDS["all"]).load(0, 1, [64, 32, 32]).swsc.layers
    assert together.weight.shape == (36, HIDDEN)


class TestWhatDoesNotFitIsRefusedByName:
    def test_rows_that_do_not_make_up_a_matrix(self) -> None:
        whole = Whole(SIDE_BY_SIDE, KINDS["q and k"])
        whole.stored[f"{NAME}.weight"] = torch.zeros(1, HIDDEN)
        whole.entries[f"{NAME}.k.weight"]["rows"] = [60, 32, 128, 1]
        with pytest.raises(ValueError, match=r"a\.query_key_value: .*overlap"):
            whole.load(0, 1, [64, 32, 32])

    def test_a_piece_of_another_size_than_its_rows(self) -> None:
        whole = Whole(SIDE_BY_SIDE, KINDS["q and k"])
        whole.entries[f"{NAME}.k.weight"]["rows"] = [64, 16, 128, 1]
        with pytest.raises(ValueError, match=r"a\.query_key_value\.k.*rows .* 32 rows of its shape"):
            whole.load(0, 1, [64, 32, 32])

    def test_a_missing_part_of_a_piece(self) -> None:
        whole = Whole(SIDE_BY_SIDE, KINDS["all"])
        method, layer = self.method(whole), Linear(0, 1)
        method.create_weights(layer, HIDDEN, [64, 32, 32], HIDDEN, 128, torch.float32)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"not in the checkpoint: .*a\.query_key_value\.q\.labels"):
            method.process_weights_after_loading(layer)  # type: ignore[attr-defined]

    def test_heads_that_are_fused_in_another_order(self) -> None:
        blocks = {"k": RowBlocks(0, 16, 64, 2), "v": RowBlocks(16, 16, 64, 2), "q": RowBlocks(32, 32, 64, 2)}
        with pytest.raises(ValueError, match=r"a\.query_key_value: its heads are not fused as q, k and v by group"):
            Whole(blocks, {"q": OUTPUT}).load(0, 1, [64, 32, 32])

    def test_rows_of_a_rank_that_are_scattered_over_a_piece(self) -> None:
        blocks = {"q": RowBlocks(0, 16, 128, 1), "k": RowBlocks(16, 56, 128, 1), "v": RowBlocks(72, 56, 128, 1)}
        with pytest.raises(ValueError, match=r"a\.query_key_value\.k: a rank would take .* scattered .* fewer ranks"):
            Whole(blocks, {"k": OUTPUT}).load(0, 2, [32, 16, 16])

    def test_rows_that_are_not_four_numbers(self) -> None:
        whole = Whole(SIDE_BY_SIDE, KINDS["k alone"])
        whole.entries[f"{NAME}.k.weight"]["rows"] = [1, 2]
        with pytest.raises(ValueError, match=r"a\.query_key_value\.k\.weight: its entry .* is damaged"):
            self.method(whole)

    def method(self, whole: Whole) -> object:
        return Config.from_config({"format_version": 3, "tensors": whole.entries}).get_quant_method(Linear(0, 1), NAME)


class TestExperts:
    """Are restored as they load, from parts that come in any order."""

    @pytest.mark.parametrize("spec", [OUTPUT, SEGMENTS, CODED, RTN], ids=str)
    def test_the_last_part_gives_the_matrix(self, spec: Spec) -> None:
        made = encode(torch.randn(64, HIDDEN), [spec])
        experts = RestoredExperts({(3, "w1"): ("a.experts.3.w1", made.entry)})
        assert experts.parts("w1", "w3") == made.tensors.keys()
        assert not experts.parts("w2")
        *first, last = [experts.take((3, "w1"), part, tensor) for part, tensor in reversed(made.tensors.items())]
        assert first == [None] * len(first)
        assert last is not None
        assert torch.equal(last, made.restored)
        experts.require_all()

    def test_a_dense_one_passes(self) -> None:
        weight = torch.randn(4, 4)
        assert RestoredExperts({}).take((0, "w2"), "weight", weight) is weight

    def test_a_part_too_many_and_one_too_few(self) -> None:
        experts = RestoredExperts({(0, "w2"): ("a.experts.0.w2", encode(torch.randn(64, HIDDEN), [OUTPUT]).entry)})
        with pytest.raises(ValueError, match=r"a\.experts\.0\.w2\.zero_points: config\.json names no such part"):
            experts.take((0, "w2"), "zero_points", torch.zeros(1))
        with pytest.raises(ValueError, match=r"expert 1, w2\.labels: config\.json names no such part"):
            experts.take((1, "w2"), "labels", torch.zeros(1))
        with pytest.raises(ValueError, match=r"not in the checkpoint: .*a\.experts\.0\.w2\.weight"):
            experts.require_all()
