"""What `quantization_config` of a compressed checkpoint says, by version, and under which names its parts are stored.

    {"quant_method": "swsc", "format_version": 4, "tensors": {tensor name: entry, …}}

Entries are those of entry.py. A reader knows every version up to its own: an entry of version 1 (whole channels, 16-bit
values), 2 (no pieces, nothing transposed) or 3 (nothing stacked) says less, and what it leaves out has one meaning.
docs/format.md has all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import entry_of
from swsc_core.storage.location import MatrixLocation

QUANT_METHOD = "swsc"
FORMAT_VERSION = 4


def quantization_config(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What config.json states about the compressed tensors: tensor name -> what `swsc_core.decode` must know."""
    tensors = {name: entry.to_json() for name, entry in entries.items()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "tensors": tensors}


def entries_of(quantization: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries that `quantization` holds, of any version that this release reads: tensor name -> entry.

    Raises:
        ValueError: an unknown version; an entry that is damaged, naming the tensor and the key.
    """
    version, entries = quantization.get("format_version"), quantization.get("tensors")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"format version {version}, this release reads 1 to {FORMAT_VERSION}; update swsc")
    if not isinstance(entries, Mapping):
        raise ValueError("quantization_config: tensors is no table of entries; download config.json again")
    return {name: _entry(name, data, version) for name, data in entries.items()}


def _entry(name: str, data: object, version: int) -> Entry:
    try:
        if not isinstance(data, Mapping):
            raise ValueError("it is no table")
        return entry_of(data, version)
    except ValueError as error:
        raise ValueError(
            f"{name}: its entry in quantization_config is damaged ({error}); download config.json again"
        ) from None


@dataclass(frozen=True)
class CompressedTensor:
    """A tensor of a dense checkpoint that is stored compressed: as one matrix, or some of the matrices that it fuses.

    Attributes:
        name: of the dense tensor.
        entries: name of a part ("q", "3.gate") -> entry; that of a tensor that is compressed as one matrix is "".
    """

    name: str
    entries: Mapping[str, Entry]

    @property
    def is_fused(self) -> bool:
        """Whether the entries are of parts."""
        return "" not in self.entries

    @property
    def location(self) -> MatrixLocation:
        """Where its first matrix lies: the others share `transposed` and `n_experts`."""
        return next(iter(self.entries.values())).location


def compressed_tensors(entries: Mapping[str, Entry]) -> dict[str, CompressedTensor]:
    """The dense tensors that `entries` are of, by name, in the order of their first entries."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        tensor = entry.location.tensor or name
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
