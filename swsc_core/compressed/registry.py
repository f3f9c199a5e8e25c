"""Registry of compression methods. A new method is a subclass of `CompressedMatrix` and one call of `register`."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.compressed_rtn import CompressedRtn
from swsc_core.compressed.compressed_swsc import CompressedSwsc
from swsc_core.compressed.entry import Entry

_METHODS: dict[str, type[CompressedMatrix]] = {}


def register(method: type[CompressedMatrix]) -> None:
    """Add a method under the name in its class of entries; ValueError if the name is taken."""
    name = method.entry_type.method
    if _METHODS.setdefault(name, method) is not method:
        raise ValueError(f"method {name!r} is registered already; choose another name")


register(CompressedSwsc)
register(CompressedRtn)


def method_named(name: object) -> type[CompressedMatrix]:
    """The class of a method; ValueError for an unknown name."""
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"method {name!r} is unknown, expected one of {', '.join(_METHODS)}; update swsc")
    return _METHODS[name]


def method_names() -> tuple[str, ...]:
    """Names of all methods, in order of registration."""
    return tuple(_METHODS)


def part_names() -> tuple[str, ...]:
    """Names of the stored tensors of all methods, "weight" first."""
    return tuple(dict.fromkeys(part for method in _METHODS.values() for part in method.part_names))


def entry_of(data: Mapping[str, object], version: int | None = None) -> Entry:
    """The entry in a JSON object of config.json.

    Args:
        data: the JSON object.
        version: its format version; None for the current one.

    Raises:
        ValueError: an unknown method, or a damaged value, naming its key.
    """
    return method_named(data.get("method")).entry_type.from_json(data, version)


def matrix_of(tensors: Mapping[str, Tensor], entry: Entry) -> CompressedMatrix:
    """The compressed matrix of stored tensors that `codec.require_part_shapes` accepts for `entry`."""
    return method_named(entry.method).from_tensors(tensors, entry)


def can_fuse(entries: Sequence[Entry]) -> bool:
    """Whether matrices of these entries, of equal width, can be concatenated to one compressed matrix."""
    return method_named(entries[0].method).can_fuse(entries)


def fuse(matrices: Sequence[CompressedMatrix]) -> CompressedMatrix:
    """Concatenation [sum of m, n] of the rows of matrices whose entries `can_fuse` accepts."""
    return type(matrices[0]).fuse(matrices)
