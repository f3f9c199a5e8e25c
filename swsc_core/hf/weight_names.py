"""Mapping from tensor names in a checkpoint to parameter names in a transformers model, and back.

transformers renames tensors while it loads them (GPT-2's `h.0…` to `transformer.h.0…`) and merges some of them
(`experts.3.up_proj.weight` into a slice of `experts.gate_up_proj`). Its conversion tables change between releases, so
this module reads them instead of repeating them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from swsc_core.compressed.config_json import part_name, piece_name
from swsc_core.compressed.registry import part_names


class Target(NamedTuple):
    """Where a stored tensor is loaded.

    Attributes:
        parameter: name of the parameter that is loaded from the tensor, alone or merged with others.
        pattern: source pattern of the conversion that merges or splits the tensor; None without such a conversion.
    """

    parameter: str
    pattern: str | None


class WeightNames:
    """Targets of the tensors of a checkpoint in `model`, whose parameters may be on the meta device.

    Args:
        model: a transformers model.
        unfused: source patterns of conversions that are not applied, because their experts stay unfused.

    Attributes:
        converters: transformers' conversions that merge or split tensors.
    """

    def __init__(self, model: Any, unfused: frozenset[str] = frozenset()) -> None:
        transforms = without_merges(get_model_conversion_mapping(model), unfused)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def target(self, stored: str) -> Target:
        """Target of the tensor that is stored under the name `stored`."""
        target = Target(*rename_source_key(stored, self._renamings, self.converters, self._prefix, self._state))
        # transformers, too, keeps a name that is a parameter if the renamed one is not
        is_kept = target.parameter not in self._state and stored in self._state
        return Target(stored, None) if is_kept else target

    def target_of_renamed(self, renamed: str) -> Target:
        """Target of a name to which all renamings have been applied."""
        return Target(*rename_source_key(renamed, [], self.converters, self._prefix, self._state))

    def has_parameter(self, parameter: str) -> bool:
        """Whether the model had this parameter when the table was built, before any layer was replaced."""
        return parameter in self._state

    def renamed(self, stored: str) -> str:
        """The name `stored` after all renamings and before any merge."""
        name: str = rename_source_key(stored, self._renamings, [])[0]
        return name

    def renames_parts_alike(self, stored: str, pieces: Iterable[str]) -> bool:
        """Whether the stored parts of a tensor are renamed in the same way as the tensor.

        A renaming may end with `.weight`: `router.layer.weight` is renamed to `router.weight`, and
        `router.layer.labels` is not.

        Args:
            pieces: names of the compressed pieces of the tensor; "" for the whole tensor.
        """
        renamed = self.renamed(stored)
        return all(
            self.renamed(part_name(piece_name(stored, piece), part)) == part_name(piece_name(renamed, piece), part)
            for piece in pieces
            for part in part_names()
        )

    def loaded_parameters(self, stored: Iterable[str]) -> set[str]:
        """All parameters that are loaded from the tensors `stored`; a tensor that is split fills several."""
        parameters = set()
        splits = {p: c.target_patterns for c in self.converters for p in c.source_patterns}
        for name in stored:
            target, pattern = self.target(name)
            first, *further = splits[pattern] if pattern else [""]
            parameters |= {target, *(target.replace(first, replacement) for replacement in further)}
        return parameters


def without_merges(transforms: Iterable[Any], patterns: frozenset[str]) -> list[Any]:
    """The `transforms` except the conversions that have a source pattern among `patterns`."""
    return [
        transform
        for transform in transforms
        if not (isinstance(transform, WeightConverter) and patterns & {*transform.source_patterns})
    ]


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which transformers reads them: expert 2 before expert 10."""
    return sorted(names, key=dot_natural_key)


def saved_name(model: Any, parameter: str) -> str:
    """The name under which `save_pretrained` writes a parameter that is neither merged nor split."""
    saved = revert_weight_conversion(model, {parameter: model.get_parameter_or_buffer(parameter)})
    return str(next(iter(saved)))
