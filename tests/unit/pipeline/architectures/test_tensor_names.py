"""Claims about names of tensors: layers and kinds."""

import pytest

from pipeline.architectures.tensor_names import layer_number, layer_of, tensor_kind

EXPERT = "model.layers.3.mlp.experts.12.w1.weight"


@pytest.mark.parametrize(
    ("name", "layer", "number", "kind"),
    [
        (EXPERT, "model.layers.3", 3, "model.layers.N.mlp.experts.N.wN.weight"),
        ("model.norm.weight", "model.norm.weight", None, "model.norm.weight"),
        ("h.10.attn.c_attn.weight", "h.10", 10, "h.N.attn.c_attn.weight"),
    ],
)
def test_a_name_gives_its_layer_and_its_kind(name: str, layer: str, number: int | None, kind: str) -> None:
    assert (layer_of(name), layer_number(name), tensor_kind(name)) == (layer, number, kind)


def test_tensors_of_one_kind_differ_in_numbers_alone() -> None:
    assert tensor_kind(EXPERT) == tensor_kind(EXPERT.replace("12", "7").replace(".3.", ".11."))
    assert tensor_kind(EXPERT) != tensor_kind(EXPERT.replace("w1", "up"))
