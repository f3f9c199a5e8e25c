"""What vLLM and SGLang ask of the format, asked here by a stand-in with their interface.

Ranks together are the dense layer.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from swsc_core import RtnSpec, SwscSpec, encode
from swsc_core.method.spec import Spec
from swsc_core.serving.config import ServedConfig
from swsc_core.serving.methods import ServedEmbeddingMethod, ServedMethod

HIDDEN, VOCABULARY = 48, 100
ROWS = {
    "q": 64,
    "q_proj": 64,
    "k_proj": 32,
    "v_proj": 32,
    "gate_proj": 96,
    "up_proj": 96,
    "o_proj": 48,
    "qkv_proj": 128,
}
OUTPUT, INPUT = SwscSpec(12, 3, scaled=True), SwscSpec(12, 3, "input")
SEGMENTS, CODED = SwscSpec(16, 2, segment_size=6, codebooks=4, scaled=True), SwscSpec(8, 2, centroid_bits=8)
RTN = RtnSpec(4, "group", 16)


class Linear(nn.Module):
    """A layer of an engine, with what engines have set when they ask for weights."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.quant_method: Any = None


class Embedding(nn.Module):
    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.org_vocab_size, self.embedding_dim = VOCABULARY, HIDDEN
        self.num_embeddings_per_partition = 128 // ranks
        first, last = (min(VOCABULARY, (rank + after) * 128 // ranks) for after in (0, 1))
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=first, org_vocab_end_index=last, num_added_elements=0
        )


class Head(Embedding): ...


class Method(ServedMethod):
    def rank_and_size(self, layer: nn.Module) -> tuple[int, int]:
        return layer.rank, layer.ranks  # type: ignore[return-value]


class EmbeddingMethod(ServedEmbeddingMethod): ...


class Engine:
    def __init__(self) -> None:
        self.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }


class Config(ServedConfig, Engine):
    linear, embedding, head = Linear, Embedding, Head
    linear_method, embedding_method = Method, EmbeddingMethod
    dense_linear_method, dense_head_method = object, object


class Checkpoint:
    """Random matrices, some compressed: `stored` and `dense` by tensor name."""

    def __init__(self, specs: Mapping[str, Spec | None], columns: int = HIDDEN) -> None:
        self.stored: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.entries: dict[str, Any] = {}
        for seed, (name, spec) in enumerate(specs.items()):
            torch.manual_seed(seed)
            weight = torch.randn(ROWS.get(name.rpartition(".")[2], VOCABULARY), columns)
            self.dense[name], self.stored[f"{name}.weight"] = weight, weight
            if spec:
                made = encode(weight, [spec])
                self.dense[name], self.entries[f"{name}.weight"] = made.restored, made.entry.to_json()
                self.stored |= {f"{name}.{part}": tensor for part, tensor in made.tensors.items()}

    def config(self) -> Config:
        return Config.from_config({"format_version": 2, "tensors": self.entries})  # type: ignore[return-value]

    def load(
        self,
        layer: nn.Module,
        method: ServedMethod,
        shards: Mapping[str, str | int | None],
        sizes: Sequence[int],
        width: int,
    ) -> Any:
        """Create weights, hand over every tensor of `shards` (name -> shard id), last part first, and finish."""
        method.create_weights(layer, width, list(sizes), HIDDEN, sum(sizes), torch.float32, weight_loader=None)
        for name, tensor in reversed(self.stored.items()):
            stem, _, part = name.rpartition(".")
            if stem in shards:
                parameter = getattr(layer, part)
                shard = shards[stem]
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
        method.process_weights_after_loading(layer)
        return layer


def qkv(checkpoint: Checkpoint, rank: int, ranks: int, heads: int = 4) -> Any:
    layer = Linear(rank, ranks)
    method = checkpoint.config().get_quant_method(layer, "a.qkv_proj")
    sizes = [64 // ranks, *[32 // min(ranks, heads)] * 2]
    layer.quant_method = method
    return checkpoint.load(layer, method, {"a.q_proj": "q", "a.k_proj": "k", "a.v_proj": "v"}, sizes, HIDDEN)


def applied(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs: Tensor = layer.quant_method.apply(layer, x, bias)
    return outputs


KINDS: dict[str, tuple[Spec | None, Spec | None, Spec | None]] = {
    "output channels": (OUTPUT, OUTPUT, SwscSpec(9, 0)),
    "input channels": (INPUT, INPUT, INPUT),
    "segments with codebooks": (SEGMENTS, SEGMENTS, SEGMENTS),
    "few bits": (CODED, CODED, CODED),
    "rtn": (RTN, RTN, RTN),
    "q and k alone": (OUTPUT, OUTPUT, None),
    "one of each": (RTN, None, SEGMENTS),
    "compensation alone beside clusters": (OUTPUT, SwscSpec(0, 4), OUTPUT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_qkv_of_all_ranks_is_that_of_the_dense_weights(kind: str, ranks: int) -> None:
    checkpoint = Checkpoint(dict(zip(["a.q_proj", "a.k_proj", "a.v_proj"], KINDS[kind], strict=True)))
    x, found = torch.randn(2, 3, HIDDEN), []
    for rank in range(ranks):
        y = applied(qkv(checkpoint, rank, ranks), x)
        found.append(y.split([64 // ranks, 32 // ranks, 32 // ranks], dim=-1))
    for outputs, weight in zip(zip(*found, strict=True), checkpoint.dense.values(), strict=True):
        assert torch.allclose(torch.cat(outputs, -1), linear(x, weight), atol=1e-4)


def test_heads_fewer_than_ranks_are_repeated() -> None:
    checkpoint = Checkpoint({"a.q_proj": OUTPUT, "a.k_proj": OUTPUT, "a.v_proj": SEGMENTS})
    x = torch.randn(3, HIDDEN)
    for rank in range(4):
        _, k, v = applied(qkv(checkpoint, rank, 4, heads=2), x).split([16, 16, 16], dim=-1)
        rows = slice(rank // 2 * 16, rank // 2 * 16 + 16)
        for y, name in ((k, "a.k_proj"), (v, "a.v_proj")):
            assert torch.allclose(y, linear(x, checkpoint.dense[name][rows]), atol=1e-4)


def test_whole_output_channels_are_one_product() -> None:
    checkpoint = Checkpoint({"a.q_proj": OUTPUT, "a.k_proj": OUTPUT, "a.v_proj": OUTPUT})
    (together,) = qkv(checkpoint, 0, 1).swsc.layers
    assert together.weight.shape == (36, HIDDEN)
    checkpoint = Checkpoint({"a.q_proj": OUTPUT, "a.k_proj": OUTPUT, "a.v_proj": SEGMENTS})
    assert len(qkv(checkpoint, 0, 1).swsc.layers) == 2


@pytest.mark.parametrize("spec", [OUTPUT, INPUT, SEGMENTS, CODED, RTN], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_row_parallel_ranks_add_up(spec: Spec, ranks: int) -> None:
    checkpoint, x, bias = Checkpoint({"a.o_proj": spec}), torch.randn(5, HIDDEN), torch.randn(48)
    width = HIDDEN // ranks
    total = torch.zeros(5, 48)
    for rank, part in enumerate(x.split(width, dim=-1)):
        layer = Linear(rank, ranks)
        layer.quant_method = checkpoint.config().get_quant_method(layer, "a.o_proj")
        checkpoint.load(layer, layer.quant_method, {"a.o_proj": None}, [48], width)
        total += applied(layer, part, bias if rank == 0 else None)
    assert torch.allclose(total, linear(x, checkpoint.dense["a.o_proj"], bias), atol=1e-4)


@pytest.mark.parametrize("spec", [OUTPUT, SEGMENTS, RTN], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tensor_that_is_fused_in_the_checkpoint_is_split_by_what_it_holds(spec: Spec, ranks: int) -> None:
    checkpoint, x = Checkpoint({"a.qkv_proj": spec}), torch.randn(3, HIDDEN)
    expected = linear(x, checkpoint.dense["a.qkv_proj"]).split([64, 32, 32], dim=-1)
    for rank in range(ranks):
        layer, config = Linear(rank, ranks), checkpoint.config()
        config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
        layer.quant_method = config.get_quant_method(layer, "a.qkv_proj")
        checkpoint.load(
            layer, layer.quant_method, {"a.qkv_proj": None}, [64 // ranks, 32 // ranks, 32 // ranks], HIDDEN
        )
        mine = [y.chunk(ranks, dim=-1)[rank] for y in expected]
        assert torch.allclose(applied(layer, x), torch.cat(mine, -1), atol=1e-4)


@pytest.mark.parametrize("spec", [OUTPUT, INPUT, SEGMENTS, CODED, RTN], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("prefix", ["", "m.embed_tokens"])
def test_an_embedding_and_the_head_that_shares_it(spec: Spec, ranks: int, prefix: str) -> None:
    if spec == SEGMENTS:
        spec = SwscSpec(16, 2, segment_size=6, codebooks=4)
    checkpoint, x = Checkpoint({"m.embed_tokens": spec, "lm_head": OUTPUT}), torch.randn(3, HIDDEN)
    weight = checkpoint.dense["m.embed_tokens"]
    for rank in range(ranks):
        layer = Embedding(rank, ranks)
        method = checkpoint.config().get_quant_method(layer, prefix)
        checkpoint.load(layer, method, {"m.embed_tokens": None}, [128 // ranks], HIDDEN)
        first, last = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        ids = torch.tensor([[0, last - first - 1]])
        assert torch.allclose(method.embedding(layer, ids), embedding(ids + first, weight), atol=1e-4)
        expected = nn.functional.pad(linear(x, weight[first:last]), (0, 128 // ranks - (last - first)))
        assert torch.allclose(method.apply(layer, x), expected, atol=1e-4)


def test_a_rank_holds_its_slices_alone() -> None:
    checkpoint = Checkpoint({"a.q_proj": SEGMENTS, "a.k_proj": RTN, "a.v_proj": None})
    sizes = [sum(p.untyped_storage().nbytes() for p in qkv(checkpoint, 0, ranks).parameters()) for ranks in (1, 4)]
    assert sizes[1] < 0.35 * sizes[0]


class TestWhatDoesNotFitIsRefusedByName:
    def refused(self, message: str, change: Mapping[str, Tensor | None], ranks: int = 1) -> None:
        checkpoint = Checkpoint({"a.q_proj": OUTPUT, "a.k_proj": RTN, "a.v_proj": None})
        for name, tensor in change.items():
            checkpoint.stored.pop(name)
            checkpoint.stored |= {} if tensor is None else {name: tensor}
        with pytest.raises(ValueError, match=message):
            qkv(checkpoint, 0, ranks)

    def test_a_missing_part(self) -> None:
        self.refused(r"not in the checkpoint: a\.q_proj\.labels; `swsc verify DIR`", {"a.q_proj.labels": None})
        self.refused(r"not in the checkpoint: a\.v_proj\.weight", {"a.v_proj.weight": None})

    def test_a_part_of_another_shape(self) -> None:
        self.refused(
            r"a\.q_proj\.labels is uint8 \[5\], .*\[32\]", {"a.q_proj.labels": torch.zeros(5, dtype=torch.uint8)}
        )
        self.refused(r"a\.q_proj\.weight is float32 \[3, 48\], .*\[12, 48\]", {"a.q_proj.weight": torch.zeros(3, 48)})

    def test_a_label_beyond_the_centroids(self) -> None:
        self.refused(
            r"a\.q_proj\.labels: label 15 is out of range for 12",
            {"a.q_proj.labels": torch.full((32,), 255, dtype=torch.uint8)},
        )

    def test_a_dense_tensor_of_another_shape(self) -> None:
        self.refused(r"a\.v_proj: a matrix of 30×48 does not divide", {"a.v_proj.weight": torch.zeros(30, 48)}, 4)

    def test_a_part_that_nobody_knows(self) -> None:
        checkpoint = Checkpoint({"a.q_proj": OUTPUT, "a.k_proj": OUTPUT, "a.v_proj": RTN})
        checkpoint.stored["a.q_proj.zero_points"] = torch.zeros(1, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"a\.q_proj\.zero_points: config\.json names no such part"):
            qkv(checkpoint, 0, 1)

    def test_ranks_that_do_not_divide_a_matrix(self) -> None:
        checkpoint, layer = Checkpoint({"a.o_proj": OUTPUT}), Linear(0, 5)
        method = checkpoint.config().get_quant_method(layer, "a.o_proj")
        with pytest.raises(ValueError, match=r"a\.o_proj: a matrix of 48×48 does not divide"):
            checkpoint.load(layer, method, {"a.o_proj": None}, [48], 9)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"format_version": 99, "tensors": {}}, "format version 99, this release reads 1 to 4; update swsc"),
            ({"tensors": {}}, "format version None"),
            ({"format_version": 2}, "quantization_config: tensors"),
            ({"format_version": 2, "tensors": {"a.weight": {"method": "swsc"}}}, r"a\.weight: its entry .* damaged"),
            ({"format_version": 2, "tensors": {"a.weight": 3}}, r"a\.weight: its entry .* damaged"),
        ],
    )
    def test_a_configuration(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Config.from_config(config)

    def test_an_expert(self) -> None:
        config = Checkpoint({"a.experts.0.up_proj": OUTPUT}).config()
        with pytest.raises(ValueError, match=r"a\.experts\.0\.up_proj\.weight: a Module is not served compressed"):
            config.get_quant_method(nn.Module(), "a.experts")

    def test_two_tensors_that_may_be_the_embedding(self) -> None:
        config = Checkpoint({"m.embed_tokens": OUTPUT, "m.other_tokens": OUTPUT}).config()
        with pytest.raises(ValueError, match=r"m\.embed_tokens and m\.other_tokens may each be the embedding"):
            config.get_quant_method(Embedding(0, 1), "")


def test_what_is_not_compressed_is_left_to_the_engine() -> None:
    config = Checkpoint({"a.q_proj": OUTPUT}).config()
    assert type(config.get_quant_method(Linear(0, 1), "a.o_proj")) is object
    assert type(config.get_quant_method(Head(0, 1), "lm_head")) is object
    assert config.get_quant_method(Embedding(0, 1), "") is None
    assert config.get_quant_method(nn.Module(), "a.attn") is None
