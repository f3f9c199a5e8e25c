"""Stored names and the names that a model gives to the same tensors.

transformers renames while it loads (GPT-2's `h.0…` becomes `transformer.h.0…`) and merges (`experts.3.up_proj.weight` becomes
a slice of `experts.gate_up_proj`), by tables that change from release to release. Its own tables are asked here.
"""

from collections.abc import Iterable
from typing import Any

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


class WeightNames:
    """Where the tensors of a checkpoint go in `model`, which may still be empty.

    Args:
        apart: patterns of merges that are not made.

    Attributes:
        converters: those that merge or split.
    """

    def __init__(self, model: Any, apart: frozenset[str] = frozenset()) -> None:
        transforms = without(get_model_conversion_mapping(model), apart)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def target(self, stored: str) -> tuple[str, str | None]:
        """The parameter that `stored` becomes, or becomes part of, and the pattern of the merge, if it is one."""
        found: tuple[str, str | None] = rename_source_key(
            stored, self._renamings, self.converters, self._prefix, self._state
        )
        if found[0] not in self._state and stored in self._state:  # transformers, too, leaves such a name alone
            return stored, None
        return found

    def merged(self, renamed: str) -> tuple[str, str | None]:
        """The same for a name as merges see it."""
        found: tuple[str, str | None] = rename_source_key(renamed, [], self.converters, self._prefix, self._state)
        return found

    def has_parameter(self, parameter: str) -> bool:
        """Whether the model had such a parameter before any was replaced."""
        return parameter in self._state

    def renamed(self, stored: str) -> str:
        """`stored` as merges see it."""
        name: str = rename_source_key(stored, self._renamings, [])[0]
        return name

    def lead_beside(self, stored: str, pieces: Iterable[str]) -> bool:
        """Whether the parts of `stored` (of its pieces, "" for the whole) are renamed as it is itself.

        A pattern may end with `.weight`: `router.layer.weight` becomes `router.weight`, `router.layer.labels` stays.
        """
        renamed = self.renamed(stored)
        return all(
            self.renamed(part_name(piece_name(stored, piece), part)) == part_name(piece_name(renamed, piece), part)
            for piece in pieces
            for part in part_names()
        )

    def filled(self, stored: Iterable[str]) -> set[str]:
        """All parameters that the tensors `stored` become; a tensor that is split becomes several."""
        found = set()
        splits = {p: c.target_patterns for c in self.converters for p in c.source_patterns}
        for name in stored:
            target, pattern = self.target(name)
            first, *others = splits[pattern] if pattern else [""]
            found |= {target, *(target.replace(first, other) for other in others)}
        return found


def without(transforms: Iterable[Any], apart: frozenset[str]) -> list[Any]:
    """`transforms` but those that merge by a pattern of `apart`."""
    return [
        entry for entry in transforms if not (isinstance(entry, WeightConverter) and apart & {*entry.source_patterns})
    ]


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which transformers reads them: expert 2 before expert 10."""
    return sorted(names, key=dot_natural_key)


def saved_name(model: Any, parameter: str) -> str:
    """The name under which `save_pretrained` writes a parameter that is neither merged nor split."""
    return next(iter(revert_weight_conversion(model, {parameter: model.get_parameter_or_buffer(parameter)})))
