"""`quantization_config` of a compressed checkpoint, in all format versions, and the names of stored tensors.

    {"quant_method": "swsc", "format_version": 4, "tensors": {tensor name: entry, …}}

Entries are defined in entry.py. All versions up to FORMAT_VERSION are readable. Entries of version 1 (whole channels,
16-bit values), 2 (no pieces of fused tensors, no transposed tensors) and 3 (no stacked tensors) have fewer keys, whose
absence is unambiguous. docs/format.md is the specification.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import entry_of
from swsc_core.storage.json_fields import JsonValue
from swsc_core.storage.location import MatrixLocation

QUANT_METHOD = "swsc"
FORMAT_VERSION = 4


def quantization_config(entries: Mapping[str, Entry]) -> dict[str, JsonValue]:
    """The value of `quantization_config` for the entries of all compressed tensors, by tensor name."""
    tensors = {name: entry.to_json() for name, entry in entries.items()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "tensors": tensors}


def entries_of(quantization: Mapping[str, object]) -> dict[str, Entry]:
    """Tensor name -> entry, from a `quantization_config` of any readable version.

    Raises:
        ValueError: an unknown version, or a damaged entry, naming the tensor and the key.
    """
    version, entries = quantization.get("format_version"), quantization.get("tensors")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"format version {version}, this release reads 1 to {FORMAT_VERSION}; update swsc")
    if not isinstance(entries, Mapping):
        raise ValueError("quantization_config: tensors is not an object; download config.json again")
    return {name: _entry(name, data, version) for name, data in entries.items()}


def _entry(name: str, data: object, version: int) -> Entry:
    try:
        if not isinstance(data, Mapping):
            raise ValueError("it is not an object")
        return entry_of(data, version)
    except ValueError as error:
        raise ValueError(
            f"{name}: its entry in quantization_config is damaged ({error}); download config.json again"
        ) from None


@dataclass(frozen=True)
class CompressedTensor:
    """A tensor of a dense checkpoint that is stored compressed, as one matrix or as pieces that it fuses.

    Attributes:
        name: of the dense tensor.
        entries: name of a piece ("q", "3.gate") -> entry. A tensor that is compressed as one matrix has the single name
            "".
    """

    name: str
    entries: Mapping[str, Entry]

    @property
    def is_fused(self) -> bool:
        """Whether the tensor is compressed in pieces."""
        return "" not in self.entries

    @property
    def location(self) -> MatrixLocation:
        """Location of its first matrix. All its matrices have the same `transposed` and `n_experts`."""
        return next(iter(self.entries.values())).location


def compressed_tensors(entries: Mapping[str, Entry]) -> dict[str, CompressedTensor]:
    """The dense tensors that the given matrices belong to, by name, in the order of their first entries."""
    pieces_of: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        tensor = entry.location.tensor or name
        stem = tensor.removesuffix(".weight")
        piece = "" if tensor == name else name.removeprefix(f"{stem}.").removesuffix(".weight")
        pieces_of.setdefault(tensor, {})[piece] = entry
    return {name: CompressedTensor(name, pieces) for name, pieces in pieces_of.items()}


def piece_name(tensor: str, piece: str) -> str:
    """Name of the matrix that is the piece `piece` of a tensor; the inverse of `compressed_tensors`."""
    return f"{tensor.removesuffix('.weight')}.{piece}.weight" if piece else tensor


def part_name(tensor: str, part: str) -> str:
    """Name of a stored tensor: `X.left` for the tensor `X.weight` and the part `left`."""
    stem = tensor.removesuffix(".weight")
    return tensor if part == "weight" else f"{stem}.{part}"
