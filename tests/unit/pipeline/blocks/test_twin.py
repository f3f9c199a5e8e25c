"""A family in which more than hidden states travels between layers is refused."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.blocks.layered_model import LayeredModel
from pipeline.blocks.skeleton import empty_model
from pipeline.blocks.twin import narrow_config, require_blocks
from pipeline.errors import BlocksUnsupported
from tests.support.blocks import blocks_of

t: Any = transformers
N_LAYERS = 3
SHAPE = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
CONFIG = t.LlamaConfig(**SHAPE, num_hidden_layers=N_LAYERS, num_key_value_heads=2)


class Layer(LlamaDecoderLayer):
    """A layer of the families below; `shared` is one object for all layers of a model."""

    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__(config, number)
        self.number = number
        self.shared: list[Tensor] = []


class Family(LlamaForCausalLM):
    """A Llama with another kind of layers."""

    layer: type[Layer] = Layer

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([self.layer(config, number) for number in range(config.num_hidden_layers)])
        shared: list[Tensor] = []
        for layer in self.model.layers:
            layer.shared = shared


class ListLayer(Layer):
    """Adds what the layer before appended to a list."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if self.number:
            hidden_states = hidden_states + self.shared[-1]
        self.shared.append(hidden_states.tanh())
        return super().forward(hidden_states, *arguments, **named)


class AttributeLayer(Layer):
    """Adds the output of the first layer, kept as an attribute of the position embeddings that all layers get."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        output = super().forward(hidden_states, *arguments, **named)
        holder = named["position_embeddings"][0]
        if self.number == 0:
            holder.first = output
        return output + getattr(holder, "first", 0)


class ModuleLayer(Layer):
    """Adds the output of the first layer, which stays in the model from one forward pass to the next."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        output = super().forward(hidden_states, *arguments, **named)
        if self.number == 0:
            self.shared[:] = [output]
        return output + self.shared[0]


class TupleLayer(Layer):
    """Returns a second value, which the model passes to the next layer."""

    def forward(self, hidden_states: Any, *arguments: Any, **named: Any) -> Any:
        hidden_states, before = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        output = super().forward(hidden_states, *arguments, **named)
        assert isinstance(output, Tensor)
        return (output if before is None else output + before, output.tanh())


class PureLayer(Layer):
    """Uses nothing but its arguments."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        return super().forward(hidden_states, *arguments, **named) * 1.5


def family(kind: type[Layer]) -> Any:
    return type(kind.__name__.replace("Layer", "Family"), (Family,), {"layer": kind})


class TupleFamily(Family):
    """Unpacks what the last layer returns."""

    layer = TupleLayer

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.norm.register_forward_pre_hook(lambda _, arguments: (arguments[0][0],))


REFUSED = [*map(family, (ListLayer, AttributeLayer, ModuleLayer)), TupleFamily]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", [1, 2])
def test_a_family_whose_layers_hand_another_value_on_is_refused(kind: Any, size: int) -> None:
    with pytest.raises(BlocksUnsupported, match=f"model: {kind.__name__} cannot run in blocks of layers"):
        require_blocks(kind, CONFIG, blocks_of(N_LAYERS, size), "model")


@pytest.mark.parametrize("kind", [family(PureLayer), LlamaForCausalLM])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_family_whose_layers_hand_on_hidden_states_alone_is_accepted(kind: Any, size: int) -> None:
    assert require_blocks(kind, CONFIG, blocks_of(N_LAYERS, size), "model") == 0


def test_a_value_that_stays_within_a_block_is_no_obstacle() -> None:
    require_blocks(family(ListLayer), CONFIG, blocks_of(N_LAYERS, N_LAYERS), "model")


def test_the_length_of_the_tuple_that_layers_return_is_found() -> None:
    config = t.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert require_blocks(t.FalconForCausalLM, config, blocks_of(2, 1), "model") > 0


def test_a_class_without_a_list_of_decoder_layers_is_refused() -> None:
    class Unrolled(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            layers = self.model.layers
            self.model.layers = nn.ModuleList([nn.Sequential(layer) for layer in layers])

    with pytest.raises(BlocksUnsupported, match="Unrolled has 0 lists of 3 decoder layers"):
        require_blocks(Unrolled, CONFIG, blocks_of(N_LAYERS, 1), "model")
    twin = empty_model(Unrolled, CONFIG, torch.float32, "cpu")
    with pytest.raises(BlocksUnsupported):
        LayeredModel(type("Bare", (), {"model": twin})())


def test_a_twin_that_cannot_be_built_is_refused_with_its_error_in_one_line() -> None:
    class Broken(LlamaForCausalLM):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            raise ZeroDivisionError("first line\nsecond line")

    with pytest.raises(BlocksUnsupported, match=r"its narrow twin fails \(.*first line\); use workers") as caught:
        require_blocks(Broken, CONFIG, blocks_of(N_LAYERS, 1), "model")
    assert "second" not in str(caught.value)


def test_a_deep_model_is_not_refused_for_values_that_overflow() -> None:
    config = t.LlamaConfig(**SHAPE, num_hidden_layers=40)
    require_blocks(LlamaForCausalLM, config, blocks_of(40, 10), "model")


def test_the_twin_is_narrow_and_as_deep_as_the_model() -> None:
    narrow = narrow_config(LlamaConfig(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64))
    assert narrow.num_hidden_layers == 80
    assert narrow.hidden_size == narrow.num_attention_heads * 128 <= 512
    weights = sum(tensor.numel() for tensor in empty_model(LlamaForCausalLM, narrow, torch.float32, "cpu").parameters())
    assert weights < 150e6


def test_gemma_3n_with_shared_keys_and_values_is_refused() -> None:
    config = t.Gemma3nTextConfig(
        vocab_size=256, vocab_size_per_layer_input=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2, altup_active_idx=0,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(BlocksUnsupported, match="Gemma3nForCausalLM cannot run in blocks of layers"):
        require_blocks(t.Gemma3nForCausalLM, config, blocks_of(4, 1), "model")
