"""Restoring of compressed tensors to dense ones while transformers loads them.

Some tensors have no compressed layer in the model: fused experts that cannot be unfused (experts.py) are slices of one
parameter, a router may be a bare parameter, and with `dequantize` every layer is dense. An additional first step of
transformers' weight conversions restores these tensors from their parts, before the steps that merge them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from swsc_core.compressed.codec import decode
from swsc_core.compressed.config_json import CompressedTensor, compressed_tensors, part_name, piece_name
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import part_names
from swsc_core.hf.load_plan import LoadPlan
from swsc_core.hf.weight_names import WeightNames, in_natural_order
from swsc_core.storage.location import row_blocks_of
from swsc_core.storage.row_blocks import fuse_rows

_WEIGHT = re.compile(r"(\\?\.)?weight\$?$")
# what transformers collects per source pattern: a single tensor, or tensors in natural order of their names
Collected = dict[str, list[Tensor] | Tensor]


class Restore(ConversionOps):
    """First step of a weight conversion: stored parts in, dense weights out.

    Args:
        entries: matrix name -> entry of the compressed tensors.
        sources: parameter -> for each source pattern of its conversion, the stored weights that match it in natural
            order. Weights without an entry are passed through.
        dtype: dtype of the restored weights.
        is_last: no further step follows, so that the result is the parameter itself.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        sources: Mapping[str, Sequence[Sequence[str]]],
        dtype: torch.dtype,
        is_last: bool,
    ) -> None:
        self.entries, self.sources, self.dtype, self.is_last = entries, sources, dtype, is_last

    def __deepcopy__(self, memo: dict[int, Any]) -> "Restore":
        return self  # immutable, and transformers copies the conversion for every parameter

    @property
    def reverse_op(self) -> ConversionOps:
        """Not available: after loading, the model saves by its own conversions."""
        raise NotImplementedError

    @torch.no_grad()
    def convert(
        self,
        input_dict: Collected,
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Restore the weights that are loaded into the parameter `full_layer_name`.

        Args:
            input_dict: source pattern -> collected tensors; emptied.
            source_patterns: for each source of the original conversion, one pattern per part name.
            target_patterns: those of the conversion.
            full_layer_name: name of the parameter.
        """
        n_parts = len(part_names())
        dense: dict[str, list[Tensor]] = {}
        for number, names in enumerate(self.sources[full_layer_name]):
            patterns = source_patterns[number * n_parts : (number + 1) * n_parts]
            parts = {part: _tensors(input_dict.pop(p, [])) for part, p in zip(part_names(), patterns, strict=True)}
            dense[patterns[0]] = [self._restored(name, parts) for name in names]
        return {target_patterns[0]: next(iter(dense.values()))} if self.is_last else dense

    def _restored(self, name: str, parts: Mapping[str, Iterator[Tensor]]) -> Tensor:
        """The next weight, of this name, from iterators over the parts of all weights."""
        if name not in self.entries:
            return next(parts["weight"])
        entry = self.entries[name]
        return entry.location.to_checkpoint_layout(_decoded(name, entry, parts)).to(self.dtype)


class RestoreFused(Restore):
    """First step for one fused tensor: parts of its pieces and the remaining rows in, the dense tensor out.

    Args:
        tensor: the tensor, with its entries in natural order.
        dtype: dtype of the restored tensor.
        is_last: no further step follows.
    """

    def __init__(self, tensor: CompressedTensor, dtype: torch.dtype, is_last: bool) -> None:
        super().__init__(tensor.entries, {}, dtype, is_last)
        self.tensor = tensor

    @torch.no_grad()
    def convert(
        self,
        input_dict: Collected,
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Restore the fused tensor.

        Args:
            input_dict: source pattern -> collected tensors; emptied.
            source_patterns: the pattern of the remaining rows, then one pattern per part name that matches all pieces.
            target_patterns: those of the conversion.
            full_layer_name: name of the parameter; not needed.
        """
        remaining, *collected = (_tensors(input_dict.pop(pattern, [])) for pattern in source_patterns)
        parts = dict(zip(part_names(), collected, strict=True))
        rows = row_blocks_of(entry.location for entry in self.entries.values())
        pieces = (_decoded(piece, entry, parts) for piece, entry in self.entries.items())
        fused = fuse_rows(next(remaining), rows, pieces)
        tensor = self.tensor.location.to_checkpoint_layout(fused).to(self.dtype)
        return {(target_patterns if self.is_last else source_patterns)[0]: [tensor]}


def _decoded(name: str, entry: Entry, parts: Mapping[str, Iterator[Tensor]]) -> Tensor:
    try:
        return decode({part: next(parts[part]) for part in entry.part_shapes()}, entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; run `swsc verify`, then compress or download it again") from None


def _tensors(collected: list[Tensor] | Tensor) -> Iterator[Tensor]:
    return iter(collected if isinstance(collected, list) else [collected])


def why_not_restorable(tensor: str, is_fused: bool, names: WeightNames) -> str | None:
    """Why a compressed tensor that transformers converts while loading cannot be restored first; None if it can.

    Args:
        tensor: name of the stored tensor.
        is_fused: pieces of the tensor are compressed, not the tensor as one matrix.
        names: targets in the model.
    """
    pattern = names.target(tensor).pattern
    for converter in names.converters if pattern else ():
        if pattern not in converter.source_patterns:
            continue
        targets = converter._original_target_patterns
        if len(converter.target_patterns) > 1:
            return f"transformers splits it into {', '.join(targets)} while loading"
        if is_fused and len(converter.source_patterns) > 1:
            return f"transformers fuses it with others into {targets[0]} while loading"
        if not is_fused and not all(_WEIGHT.search(source) for source in converter._original_source_patterns):
            return f"transformers converts it into {targets[0]} while loading"
    return None


def _require_restorable(tensor: CompressedTensor, names: WeightNames) -> None:
    if reason := why_not_restorable(tensor.name, tensor.is_fused, names):
        raise ValueError(f"{tensor.name} cannot be opened compressed: {reason}; use `swsc restore`, or compress again")


def restore_conversions(conversions: Sequence[Any], plan: LoadPlan) -> list[Any]:
    """transformers' weight `conversions` with steps that restore the tensors of `plan.restored`.

    A conversion that merges a restored tensor gets a first step that restores it. A restored tensor that no conversion
    merges gets a conversion of its own.

    Raises:
        ValueError: transformers converts a tensor in a way that cannot follow a restoring step.
    """
    tensors = compressed_tensors(plan.entries)
    restored = [tensors[name] for name in plan.restored]
    for tensor in restored:
        _require_restorable(tensor, plan.names)
    targets = {tensor.name: plan.names.target(tensor.name) for tensor in restored if not tensor.is_fused}
    fused = [_fused_conversion(tensor, conversions, plan) for tensor in restored if tensor.is_fused]
    single = [
        _single_conversion(name, target.parameter, plan) for name, target in targets.items() if not target.pattern
    ]
    patterns = {target.pattern for target in targets.values() if target.pattern}
    sources = _merge_sources({*plan.stored, *targets}, patterns, plan.names)
    merging = [
        _merging_conversion(conversion, sources, plan) if patterns & set(conversion.source_patterns) else conversion
        for conversion in conversions
    ]
    return fused + single + merging


def _merge_sources(stored: Iterable[str], patterns: set[str], names: WeightNames) -> dict[str, dict[str, list[str]]]:
    """Parameter -> source pattern among `patterns` -> stored names that match it, in the order of merging.

    With two experts, one of them compressed or both, the result is {"experts.gate_up_proj":
    {"experts.*.gate_proj.weight": ["experts.0.gate_proj.weight", "experts.1.gate_proj.weight"], …}}.
    """
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in in_natural_order(stored):
        parameter, pattern = names.target(name)
        if pattern in patterns:
            sources[parameter][pattern].append(name)
    return sources


def _merging_conversion(conversion: Any, sources: Mapping[str, Mapping[str, Sequence[str]]], plan: LoadPlan) -> Any:
    """A conversion that merges tensors, with a first step that restores the compressed ones."""
    by_parameter = {
        parameter: [names.get(pattern, []) for pattern in conversion.source_patterns]
        for parameter, names in sources.items()
    }
    restoring = WeightConverter(
        [_part_pattern(source, part) for source in conversion._original_source_patterns for part in part_names()],
        list(conversion._original_target_patterns),
        [Restore(plan.entries, by_parameter, plan.dtype, is_last=False), *conversion.operations],
    )
    restoring.scope_prefix, restoring.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return restoring


def _part_pattern(source: str, part: str) -> str:
    """The pattern of a part beside that of a weight; it is anchored, because `weight` would match `weight_scales`."""
    return re.sub(r"weight\$?$", f"{part}$", source)


def _single_conversion(name: str, parameter: str, plan: LoadPlan) -> Any:
    """A conversion that restores one tensor that is compressed as one matrix and not merged."""
    patterns = [f"^{re.escape(plan.names.renamed(part_name(name, part)))}$" for part in part_names()]
    return WeightConverter(
        patterns, parameter, [Restore(plan.entries, {parameter: [[name]]}, plan.dtype, is_last=True)]
    )


def _fused_conversion(tensor: CompressedTensor, conversions: Sequence[Any], plan: LoadPlan) -> Any:
    """A conversion that restores a fused tensor and then applies transformers' steps for it, such as a transpose.

    A stack of experts has hundreds of matrices, so one pattern matches a part of all of them.
    """
    name, names = tensor.name, plan.names
    parameter, pattern = names.target(name)
    steps = [
        step for conversion in conversions if pattern in conversion.source_patterns for step in conversion.operations
    ]
    piece = next(iter(tensor.entries))
    stem = re.escape(names.renamed(piece_name(name, piece)).removesuffix(f".{piece}.weight"))
    patterns = [f"^{re.escape(names.renamed(name))}$", *(rf"^{stem}\..+\.{part}$" for part in part_names())]
    ordered = CompressedTensor(name, {piece: tensor.entries[piece] for piece in in_natural_order(tensor.entries)})
    restore = RestoreFused(ordered, plan.dtype, is_last=not steps)
    return WeightConverter(patterns, parameter if pattern else names.renamed(name), [restore, *steps])
