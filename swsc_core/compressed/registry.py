"""The compression methods by name. A further method is a subclass of `CompressedMatrix` and one call of `register`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.compressed_rtn import CompressedRtn
from swsc_core.compressed.compressed_swsc import CompressedSwsc
from swsc_core.compressed.entry import Entry

_METHODS: dict[str, type[CompressedMatrix]] = {}


def register(method: type[CompressedMatrix]) -> None:
    """Add a method under the name that its entries state; ValueError if another one has it."""
    name = method.entry_type.method
    if _METHODS.setdefault(name, method) is not method:
        raise ValueError(f"method {name!r} is registered already")


register(CompressedSwsc)
register(CompressedRtn)


def method_named(name: object) -> type[CompressedMatrix]:
    """The class of a method; ValueError for an unknown name."""
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"method {name!r} is not known")
    return _METHODS[name]


def method_names() -> tuple[str, ...]:
    """Names of all methods, in the order of their registration."""
    return tuple(_METHODS)


def part_names() -> tuple[str, ...]:
    """Names of the stored tensors of all methods, "weight" first."""
    return tuple(dict.fromkeys(part for method in _METHODS.values() for part in method.part_names))


def entry_of(data: Mapping[str, Any], version: int | None = None) -> Entry:
    """The entry that a JSON object of config.json states, of a format version or the present one.

    Raises:
        ValueError: an unknown method; a value that is damaged, naming its key.
    """
    return method_named(data.get("method")).entry_type.from_json(data, version)


def matrix_of(tensors: Mapping[str, Tensor], entry: Entry) -> CompressedMatrix:
    """The compressed matrix of stored tensors, which `codec.require_parts` accepts for `entry`."""
    return method_named(entry.method).from_tensors(tensors, entry)


def can_fuse(entries: Sequence[Entry]) -> bool:
    """Whether matrices of these entries, of one width, can be one compressed matrix of their rows one above the other."""
    return method_named(entries[0].method).can_fuse(entries)


def fuse(matrices: Sequence[CompressedMatrix]) -> CompressedMatrix:
    """The matrix [sum of m, n] of matrices whose entries `can_fuse` accepts."""
    return type(matrices[0]).fuse(matrices)
