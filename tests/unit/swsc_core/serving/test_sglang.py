"""The door to SGLang against a stand-in for it.

The classes that its release 0.5.23 has, and how its models load weights.

SGLang needs a GPU and cannot be installed beside the rest, so this is as far as a test goes (docs/vllm.md).
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from swsc_core import SwscSpec, encode


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...
    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...
    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...
    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any: ...
    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...
    @abstractmethod
    def get_scaled_act_names(self) -> list[str]: ...


class LinearMethodBase(ABC):
    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...


class LinearBase(nn.Module): ...


class VocabParallelEmbedding(nn.Module): ...


class ParallelLMHead(VocabParallelEmbedding): ...


class UnquantizedLinearMethod: ...


class UnquantizedEmbeddingMethod: ...


def rank_size(group: Any) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank_in_group, group.world_size)


STAND_IN: dict[str, dict[str, Any]] = {
    "sglang": {},
    "sglang.srt": {},
    "sglang.srt.distributed": {},
    "sglang.srt.distributed.utils": {"get_group_rank_size": rank_size},
    "sglang.srt.layers": {},
    "sglang.srt.layers.linear": {"LinearBase": LinearBase},
    "sglang.srt.layers.quantization": {"QUANTIZATION_METHODS": {}, "CPU_QUANTIZATION_METHODS": {}},
    "sglang.srt.layers.quantization.base_config": {
        "LinearMethodBase": LinearMethodBase, "QuantizationConfig": QuantizationConfig,
    },
    "sglang.srt.layers.quantization.unquant": {
        "UnquantizedLinearMethod": UnquantizedLinearMethod, "UnquantizedEmbeddingMethod": UnquantizedEmbeddingMethod,
    },
    "sglang.srt.layers.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead, "VocabParallelEmbedding": VocabParallelEmbedding,
    },
}  # fmt: skip


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name, content in STAND_IN.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    monkeypatch.delitem(sys.modules, "swsc_core.serving.sglang", raising=False)
    yield import_module("swsc_core.serving.sglang")
    sys.modules.pop("swsc_core.serving.sglang", None)


def test_registering_makes_the_format_known(door: ModuleType) -> None:
    door.register()
    methods = sys.modules["sglang.srt.layers.quantization"]
    assert methods.QUANTIZATION_METHODS["swsc"] is methods.CPU_QUANTIZATION_METHODS["swsc"] is door.SwscConfig


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fused_layer_is_loaded_as_its_models_do_it(door: ModuleType, ranks: int) -> None:
    torch.manual_seed(0)
    made = {name: encode(torch.randn(32, 48), [SwscSpec(10, 3)]) for name in ("gate_proj", "up_proj")}
    entries = {f"m.{name}.weight": encoded.entry.to_json() for name, encoded in made.items()}
    config = door.SwscConfig.from_config(
        {"format_version": 2, "tensors": entries, "packed_modules_mapping": {}, "hf_config": object()}
    )
    x = torch.randn(3, 48)
    for rank in range(ranks):
        layer: Any = LinearBase()
        layer.tp_group = SimpleNamespace(rank_in_group=rank, world_size=ranks) if ranks > 1 else None
        method = config.get_quant_method(layer, "m.gate_up_proj")
        method.create_weights(layer, 48, [32 // ranks] * 2, 48, 64, torch.float32, weight_loader=None)
        parameters: dict[str, Any] = dict(layer.named_parameters())
        for shard, encoded in enumerate(made.values()):
            for part, tensor in encoded.tensors.items():
                parameters[part].weight_loader(parameters[part], tensor, shard)
        method.process_weights_after_loading(layer)
        expected = [linear(x, encoded.restored).chunk(ranks, -1)[rank] for encoded in made.values()]
        assert torch.allclose(method.apply(layer, x), torch.cat(expected, -1), atol=1e-4)
        assert not hasattr(layer, "weight")  # its logits processor asks the method only where there is none


def test_heads_that_two_groups_split_are_refused(door: ModuleType) -> None:
    encoded = encode(torch.randn(32, 48), [SwscSpec(10, 3)])
    config = door.SwscConfig.from_config({"format_version": 2, "tensors": {"a.q_proj.weight": encoded.entry.to_json()}})
    layer: Any = LinearBase()
    layer.tp_group, layer.kv_tp_group = object(), object()
    with pytest.raises(ValueError, match=r"a\.q_proj: heads split by two groups"):
        config.get_quant_method(layer, "a.qkv_proj").create_weights(layer, 48, [32, 32, 32], 48, 96, torch.float32)


@pytest.mark.parametrize("about", [{"tensor": "a.qkv_proj.weight", "rows": [0, 32, 32, 1]}, {"transposed": True}])
def test_fused_and_transposed_matrices_are_refused_by_name(door: ModuleType, about: dict[str, Any]) -> None:
    """Its loaders only warn of what no parameter takes, and how they would name these was not seen."""
    entry = encode(torch.randn(32, 48), [SwscSpec(10, 3)]).entry.to_json() | about
    with pytest.raises(ValueError, match=r"a\.qkv_proj.*\.weight: fused and transposed"):
        door.SwscConfig.from_config({"format_version": 3, "tensors": {"a.qkv_proj.q.weight": entry}})


def test_names_go_through_the_mapper_of_a_model(door: ModuleType) -> None:
    encoded = encode(torch.randn(32, 48), [SwscSpec(10, 3)])
    config = door.SwscConfig.from_config(
        {"format_version": 2, "tensors": {"old.o_proj.weight": encoded.entry.to_json()}}
    )
    config.apply_weight_name_mapper(
        SimpleNamespace(apply_dict=lambda names: {name.replace("old", "new"): entry for name, entry in names.items()})
    )
    assert isinstance(config.get_quant_method(LinearBase(), "new.o_proj"), door.SwscLinearMethod)
    assert isinstance(config.get_quant_method(LinearBase(), "old.o_proj"), UnquantizedLinearMethod)
