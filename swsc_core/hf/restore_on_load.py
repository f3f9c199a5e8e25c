"""Compressed tensors that have no layer of their own in the model are restored while they are loaded.

Experts that cannot be laid apart (experts.py) are slices of one parameter, a router is a bare one, and with `dequantize` every
matrix is wanted dense.
Each is restored from its parts before whatever merges follow: as a step put before those of transformers' own tables.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from swsc_core.compressed.codec import decode
from swsc_core.compressed.config_json import CompressedTensor, compressed_tensors, part_name, piece_name
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import part_names
from swsc_core.hf.weight_names import WeightNames, in_natural_order
from swsc_core.storage.location import row_blocks_of
from swsc_core.storage.row_blocks import fuse_rows

Entries = Mapping[str, Entry]
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
            patterns = source_patterns[place * len(part_names()) : (place + 1) * len(part_names())]
            waiting = {part: _listed(input_dict.pop(p, [])) for part, p in zip(part_names(), patterns, strict=True)}
            found[patterns[0]] = [self._dense(name, waiting) for name in names]
        return found if self.merges else {target_patterns[0]: next(iter(found.values()))[0]}

    def _dense(self, name: str, waiting: Mapping[str, Iterator[Tensor]]) -> Tensor:
        if name not in self.entries:
            return next(waiting["weight"])
        entry = self.entries[name]
        parts = {part: next(waiting[part]) for part in entry.part_shapes()}
        return entry.location.to_checkpoint_layout(_decoded(name, parts, entry)).to(self.dtype)


class RestoreJoined(Restore):
    """The same for one fused tensor: stored parts of all its matrices and the remaining rows in, the dense tensor out.

    Args:
        tensor: its entries are in natural order.
    """

    def __init__(self, tensor: CompressedTensor, dtype: torch.dtype, merges: bool) -> None:
        super().__init__(tensor.entries, {}, dtype, merges)
        self.tensor = tensor

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str = "", **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """`input_dict`: pattern -> tensors in natural order; patterns: the rest, then each part of all pieces."""
        rest, *parts = (_listed(input_dict.pop(pattern, [])) for pattern in source_patterns)
        waiting = dict(zip(part_names(), parts, strict=True))
        rows = row_blocks_of(entry.location for entry in self.entries.values())
        fused = fuse_rows(next(rest), rows, (self._piece(piece, waiting) for piece in self.entries))
        tensor = self.tensor.location.to_checkpoint_layout(fused).to(self.dtype)
        return {source_patterns[0]: [tensor]} if self.merges else {target_patterns[0]: tensor}

    def _piece(self, name: str, waiting: Mapping[str, Iterator[Tensor]]) -> Tensor:
        entry = self.entries[name]
        return _decoded(name, {part: next(waiting[part]) for part in entry.part_shapes()}, entry)


def _decoded(name: str, parts: Mapping[str, Tensor], entry: Entry) -> Tensor:
    try:
        return decode(parts, entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; run `swsc verify`, then compress or download it again") from None


def _listed(tensors: Any) -> Iterator[Tensor]:
    return iter(tensors if isinstance(tensors, list) else [tensors])


def why_not_restorable(tensor: str, joined: bool, names: WeightNames) -> str | None:
    """Why a compressed tensor that transformers converts while loading could not be restored before that; None if it can.

    Args:
        joined: it is compressed in pieces.
    """
    pattern = names.target(tensor)[1]
    for one in names.converters if pattern else ():
        if pattern not in one.source_patterns:
            continue
        if len(one.target_patterns) > 1:
            return f"transformers splits it into {', '.join(one._original_target_patterns)} while loading"
        if joined and len(one.source_patterns) > 1:
            return f"transformers fuses it with others into {one._original_target_patterns[0]} while loading"
        if not joined and not all(_WEIGHT.search(source) for source in one._original_source_patterns):
            return f"transformers converts it into {one._original_target_patterns[0]} while loading"
    return None


def require_restorable(tensor: str, joined: bool, names: WeightNames) -> None:
    """Raise ValueError for what `why_not_restorable` names."""
    if why := why_not_restorable(tensor, joined, names):
        raise ValueError(f"{tensor} cannot be opened compressed: {why}; use `swsc restore`, or compress again")


def with_restoring(
    converters: Sequence[Any],
    restored: Collection[str],
    entries: Entries,
    stored: Iterable[str],
    names: WeightNames,
    dtype: torch.dtype,
) -> list[Any]:
    """`converters` that restore the tensors `restored` before they do what they did, and one more for each without any.

    Args:
        stored: names of all tensors of the checkpoint: experts that are not compressed are merged with those that are.

    Of two experts, say, of which one is compressed, `sources` comes to be
    {"experts.gate_up_proj": {"experts.*.gate_proj.weight": ["experts.0.gate_proj.weight", "experts.1.gate_proj.weight"], …}}:
    parameter -> pattern of the merge -> what it finds, in the order in which it is merged.
    """
    joined = {name: tensor for name, tensor in compressed_tensors(entries).items() if tensor.is_fused}
    for name in restored:
        require_restorable(name, name in joined, names)
    targets = {name: names.target(name) for name in restored if name not in joined}
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
    alone = [
        _restorer(name, target, entries, names, dtype) for name, (target, pattern) in targets.items() if pattern is None
    ]
    whole = [_joining(joined[name], converters, names, dtype) for name in restored if name in joined]
    return whole + alone + changed


def _restoring(
    converter: Any, entries: Entries, sources: Mapping[str, Mapping[str, Sequence[str]]], dtype: torch.dtype
) -> Any:
    own = {
        target: [found.get(pattern, []) for pattern in converter.source_patterns] for target, found in sources.items()
    }
    made = WeightConverter(
        [_pattern(source, part) for source in converter._original_source_patterns for part in part_names()],
        list(converter._original_target_patterns),
        [Restore(entries, own, dtype, merges=True), *converter.operations],
    )
    made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return made


def _pattern(source: str, part: str) -> str:
    """The pattern of a part beside that of a weight; it ends there, or `weight` would find `weight_scales`."""
    return re.sub(r"weight\$?$", f"{part}$", source)


def _restorer(name: str, target: str, entries: Entries, names: WeightNames, dtype: torch.dtype) -> Any:
    patterns = [f"^{re.escape(names.renamed(part_name(name, part)))}$" for part in part_names()]
    return WeightConverter(patterns, target, [Restore(entries, {target: [[name]]}, dtype, merges=False)])


def _joining(tensor: CompressedTensor, converters: Sequence[Any], names: WeightNames, dtype: torch.dtype) -> Any:
    """What restores the fused tensor, and then does what transformers does to such a tensor (transposes it, say).

    A stack of experts has hundreds of matrices, so that a stored part of all of them is one pattern.
    """
    name, pieces = tensor.name, tensor.entries
    target, pattern = names.target(name)
    following = [one for one in converters if pattern in one.source_patterns]
    follows = [step for one in following for step in one.operations]
    piece = next(iter(pieces))
    stem = re.escape(names.renamed(piece_name(name, piece)).removesuffix(f".{piece}.weight"))
    ordered = {own: pieces[own] for own in in_natural_order(pieces)}
    patterns = [f"^{re.escape(names.renamed(name))}$", *(rf"^{stem}\..+\.{part}$" for part in part_names())]
    wanted = target if pattern else names.renamed(name)
    return WeightConverter(
        patterns, wanted, [RestoreJoined(CompressedTensor(name, ordered), dtype, merges=bool(follows)), *follows]
    )
