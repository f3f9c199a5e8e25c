"""What `quantization_config` of a compressed checkpoint says, by version, and under which names its parts are stored.

    {"quant_method": "swsc", "format_version": 4, "tensors": {tensor name: entry, …}}

Entries are those of codec.py. A reader knows every version up to its own: an entry of version 1 (whole channels, 16-bit
values), 2 (no pieces, nothing transposed) or 3 (nothing stacked) says less, and what it leaves out has one meaning.
docs/format.md has all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swsc_core.entries import require_entries
from swsc_core.location import MatrixLocation

QUANT_METHOD = "swsc"
FORMAT_VERSION = 4


def quantization_config(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json says of the compressed tensors: tensor name -> what `swsc_core.decode` must know."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "tensors": dict(entries)}


def entries_of(quantization: Mapping[str, Any]) -> Any:
    """The entries that `quantization` holds, as the present version would say them: tensor name -> entry.

    Raises:
        ValueError: a version that this release does not know; an entry with a value that is missing or of another kind.
    """
    version, entries = quantization.get("format_version"), quantization.get("tensors")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"format version {version}, this release reads 1 to {FORMAT_VERSION}; update swsc")
    if version == 1 and isinstance(entries, dict):
        entries = {name: _from_first(entry) for name, entry in entries.items()}
    require_entries(entries)
    return entries


def _from_first(entry: Any) -> Any:
    shape = entry.get("shape") if isinstance(entry, dict) and entry.get("method") == "swsc" else None
    if not isinstance(shape, list) or len(shape) != 2:
        return entry  # for `require_entries` to refuse
    length = shape[1 if entry.get("channel_axis") == "output" else 0]
    added = {"segment_size": length, "codebooks": 1, "scaled": False, "centroid_bits": None, "factor_bits": None}
    return added | entry


@dataclass(frozen=True)
class CompressedTensor:
    """A tensor of a dense checkpoint that is stored compressed: as one matrix, or some of the matrices that it fuses.

    Attributes:
        name: of the dense tensor.
        entries: name of a part ("q", "3.gate") -> entry; that of a tensor that is compressed as one matrix is "".
    """

    name: str
    entries: Mapping[str, Mapping[str, Any]]

    @property
    def is_fused(self) -> bool:
        """Whether the entries are of parts."""
        return "" not in self.entries

    @property
    def location(self) -> MatrixLocation:
        """Where its first matrix lies: the others share `transposed` and `n_experts`."""
        return MatrixLocation.from_json(next(iter(self.entries.values())))


def compressed_tensors(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, CompressedTensor]:
    """The dense tensors that `entries` are of, by name, in the order of their first entries."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entry in entries.items():
        tensor = MatrixLocation.from_json(entry).tensor or name
        stem = tensor.removesuffix(".weight")
        part = "" if tensor == name else name.removeprefix(f"{stem}.").removesuffix(".weight")
        found.setdefault(tensor, {})[part] = entry
    return {name: CompressedTensor(name, parts) for name, parts in found.items()}


def piece_name(tensor: str, piece: str) -> str:
    """Name of the matrix that is the part `piece` of a tensor; the inverse of the naming of `compressed_tensors`."""
    return f"{tensor.removesuffix('.weight')}.{piece}.weight" if piece else tensor


def part_name(tensor: str, part: str) -> str:
    """Stored name of a part: `X.weight` and part `left` give `X.left`."""
    stem = tensor.removesuffix(".weight")
    return tensor if part == "weight" else f"{stem}.{part}"
