"""Compressed tensors that have no layer of their own in the model are restored while they are loaded.

Experts are slices of one parameter in transformers, a router is a bare one, and with `dequantize` every matrix is wanted dense.
Each is restored from its parts before whatever merges follow: as a step put before those of transformers' own tables.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from swsc_core.codec import PARTS, decode, parts_of
from swsc_core.format import part_name, piece_name, pieces_of
from swsc_core.hf.names import Names, in_natural_order
from swsc_core.pieces import Rows, join, laid

Entries = Mapping[str, Mapping[str, Any]]
_WEIGHT = re.compile(r"(\\?\.)?weight\$?$")


class Restore(ConversionOps):
    """The first step of a conversion: parts in, dense weights out.

    Args:
        entries: of the tensors that are compressed.
        sources: parameter -> for each source of its conversion the stored weights that belong to it, in natural order; those
            that are not compressed pass.
        dtype: what the model calculates in.
        merges: whether further steps follow; else what comes out is the parameter.
    """

    def __init__(
        self, entries: Entries, sources: Mapping[str, Sequence[Sequence[str]]], dtype: torch.dtype, merges: bool
    ) -> None:
        self.entries, self.sources, self.dtype, self.merges = entries, sources, dtype, merges

    def __deepcopy__(self, memo: dict[int, Any]) -> "Restore":
        return self  # nothing changes it, and transformers copies it for every parameter

    @property
    def reverse_op(self) -> ConversionOps:
        """Never asked for: once loaded, the model's own conversions stand in its place again."""
        raise NotImplementedError

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str = "", **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """`input_dict`: pattern -> tensors in natural order of their names, as transformers collected them."""
        found: dict[str, Any] = {}
        for place, names in enumerate(self.sources[full_layer_name]):
            patterns = source_patterns[place * len(PARTS) : (place + 1) * len(PARTS)]
            waiting = {part: _listed(input_dict.pop(p, [])) for part, p in zip(PARTS, patterns, strict=True)}
            found[patterns[0]] = [self._dense(name, waiting) for name in names]
        return found if self.merges else {target_patterns[0]: next(iter(found.values()))[0]}

    def _dense(self, name: str, waiting: Mapping[str, Iterator[Tensor]]) -> Tensor:
        if name not in self.entries:
            return next(waiting["weight"])
        parts = {part: next(waiting[part]) for part in parts_of(self.entries[name])}
        return laid(_decoded(name, parts, self.entries[name]), self.entries[name]).to(self.dtype)


class RestoreJoined(Restore):
    """The same for one joined tensor: parts of all its pieces and the rows of none in, the tensor out."""

    def __init__(self, tensor: str, pieces: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(pieces, {}, dtype, merges=False)
        self.tensor = tensor

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str = "", **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """`input_dict`: pattern -> the one tensor that it finds; patterns: the rest, then part after part of each piece."""
        found = iter(next(_listed(input_dict.pop(pattern))) for pattern in source_patterns)
        rest, pieces = next(found), []
        for piece, entry in self.entries.items():
            parts = {part: next(found) for part in parts_of(entry)}
            pieces.append((Rows(*entry["rows"]), _decoded(f"{self.tensor} ({piece})", parts, entry)))
        whole = laid(join(rest, pieces), next(iter(self.entries.values())))
        return {target_patterns[0]: whole.to(self.dtype)}


def _decoded(name: str, parts: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    try:
        return decode(parts, entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; run `swsc verify`, then compress or download it again") from None


def _listed(tensors: Any) -> Iterator[Tensor]:
    return iter(tensors if isinstance(tensors, list) else [tensors])


def with_restoring(
    converters: Sequence[Any],
    restored: Iterable[str],
    entries: Entries,
    stored: Iterable[str],
    names: Names,
    dtype: torch.dtype,
) -> list[Any]:
    """`converters` that restore the tensors `restored` before they do what they did, and one more for each without any.

    Args:
        stored: names of all tensors of the checkpoint: experts that are not compressed are merged with those that are.
    """
    targets = {name: names.target(name) for name in restored}
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    patterns = {pattern for _, pattern in targets.values() if pattern}
    for name in in_natural_order({*stored, *targets}):
        target, pattern = names.target(name)
        if pattern in patterns:
            sources[target][pattern].append(name)
    changed = [
        _restoring(converter, entries, sources, dtype) if patterns & set(converter.source_patterns) else converter
        for converter in converters
    ]
    alone = [name for name, (_, pattern) in targets.items() if pattern is None]
    return [_restorer(name, targets[name][0], entries, names, dtype) for name in alone] + changed


def _restoring(
    converter: Any, entries: Entries, sources: Mapping[str, Mapping[str, Sequence[str]]], dtype: torch.dtype
) -> Any:
    own = {
        target: [found.get(pattern, []) for pattern in converter.source_patterns] for target, found in sources.items()
    }
    made = WeightConverter(
        [_pattern(source, part) for source in converter._original_source_patterns for part in PARTS],
        list(converter._original_target_patterns),
        [Restore(entries, own, dtype, merges=True), *converter.operations],
    )
    made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return made


def _pattern(source: str, part: str) -> str:
    """The pattern of a part beside that of a weight; it ends there, or `weight` would find `weight_scales`."""
    if not _WEIGHT.search(source):
        raise ValueError(f"transformers loads {source} in a way that restores nothing; use `swsc restore` instead")
    return re.sub(r"weight\$?$", f"{part}$", source)


def _restorer(name: str, target: str, entries: Entries, names: Names, dtype: torch.dtype) -> Any:
    renamed = names.renamed(name)
    if name not in entries:
        pieces = pieces_of(entries)[name]
        stored = [
            part_name(piece_name(renamed, piece), part) for piece, own in pieces.items() for part in parts_of(own)
        ]
        patterns = [f"^{re.escape(one)}$" for one in (renamed, *stored)]
        return WeightConverter(patterns, renamed, [RestoreJoined(name, pieces, dtype)])
    patterns = [f"^{re.escape(part_name(renamed, part))}$" for part in PARTS]
    return WeightConverter(patterns, renamed, [Restore(entries, {target: [[name]]}, dtype, merges=False)])
