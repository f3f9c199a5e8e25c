"""The adapter of a compressed model: W' plus B A is W, and PEFT's config states every rank."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoints.checkpoint import Checkpoint, read_header
from pipeline.errors import ConfigError
from pipeline.models.lora_export import adapter_bytes, adapter_config, adapter_tensors, carried_by_adapter
from pipeline.models.stored_model import Model
from pipeline.storage.store import Store
from swsc_core import encode
from swsc_core.compressed.config_json import part_name
from swsc_core.method.spec import SwscSpec

QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv")
EMBEDDING = "model.embed_tokens.weight"
SHAPES = {QUERY: (64, 64), KEY: (32, 64), VALUE: (32, 64), EMBEDDING: (256, 64)}


def compressed(folder: Path, ranks: dict[str, int]) -> Model:
    """A stored model of the matrices in `ranks`, with the shapes that they have in the tiny model."""
    weights = {name: torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0)) for name in ranks}
    encoded = {name: encode(weights[name], [SwscSpec(4, rank)], name=name) for name, rank in ranks.items()}
    parts = {part_name(name, part): t for name, one in encoded.items() for part, t in one.tensors.items()}
    save_file(parts, folder / "model.safetensors")
    store = Store.at(str(folder))
    tensors = {info.name: info for info in read_header(store, "model.safetensors")[1]}
    return Model(Checkpoint(store, tensors, {}), {name: one.entry for name, one in encoded.items()})


def test_the_product_of_the_adapter_is_what_the_bare_matrix_lacks(tmp_path: Path) -> None:
    model = compressed(tmp_path, {QUERY: 3, KEY: 2})
    tensors = dict(adapter_tensors(model, {QUERY: "layers.q", KEY: "layers.k"}))
    assert len(tensors) == 4
    for name, path in ((QUERY, "layers.q"), (KEY, "layers.k")):
        a, b = (tensors[f"base_model.model.{path}.lora_{kind}.weight"] for kind in "AB")
        torch.testing.assert_close(model.read(name, bare=True) + b @ a, model.read(name))
    assert adapter_bytes(model, {QUERY: "layers.q", KEY: "layers.k"}) == sum(4 * t.numel() for t in tensors.values())


def test_ranks_other_than_the_most_common_are_listed(tmp_path: Path) -> None:
    model = compressed(tmp_path, {QUERY: 2, KEY: 5, VALUE: 2})
    config = adapter_config(model, {QUERY: "q", KEY: "k", VALUE: "v"})
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"k": 5}
    assert config["target_modules"] == ["k", "q", "v"]


def test_linear_layers_of_the_class_are_carried_and_an_embedding_is_not(tiny_model: Path, tmp_path: Path) -> None:
    model = compressed(tmp_path, {QUERY: 2, KEY: 0, EMBEDDING: 2})
    assert carried_by_adapter(model, str(tiny_model), False) == {QUERY: QUERY.removesuffix(".weight")}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [({QUERY: 0}, "no matrix has a low-rank part"), ({EMBEDDING: 2}, "is a linear layer")],
)
def test_an_adapter_that_would_hold_nothing_is_refused(
    tiny_model: Path, tmp_path: Path, ranks: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{message}.*remove --adapter"):
        carried_by_adapter(compressed(tmp_path, ranks), str(tiny_model), False)
