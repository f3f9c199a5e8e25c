"""What config.json says of compressed tensors, held value by value against docs/format.md before anything is made of it.

It may come from anywhere, and what works from it takes it at its word: a count of blocks that is a billion, say, would be
counted through. What the values of an entry mean together is for `codec.part_shapes` to say.
"""

from collections.abc import Callable, Mapping
from typing import Any

from swsc_core.location import MatrixLocation

_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_WIDTHS = (None, 4, 6, 8)  # bits of centroids and factors


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in known)


def _wholes(count: int, least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == count and all(map(_whole(least), value))


_FLAG = _one_of(True, False)
# key -> whether it has to be there, what it may be, and that in words
_Kinds = Mapping[str, tuple[bool, Callable[[Any], bool], str]]
_EVERY: _Kinds = {
    "shape": (True, _wholes(2, 1), "two positive numbers"),
    "dtype": (True, _one_of(*_DTYPES), f"one of {', '.join(_DTYPES)}"),
}
_OF: dict[str, _Kinds] = {
    "swsc": {
        "channel_axis": (True, _one_of("output", "input"), "output or input"),
        "segment_size": (True, _whole(1), "a positive number"),
        "n_clusters": (True, _whole(0), "a number"),
        "codebooks": (True, _whole(1), "a positive number"),
        "scaled": (True, _FLAG, "true or false"),
        "rank": (True, _whole(0), "a number"),
        "centroid_bits": (True, _one_of(*_WIDTHS), "null, 4, 6 or 8"),
        "factor_bits": (True, _one_of(*_WIDTHS), "null, 4, 6 or 8"),
    },
    "rtn": {
        "bits": (True, _one_of(*range(2, 9)), "2 to 8"),
        "granularity": (True, _one_of("tensor", "channel", "group"), "tensor, channel or group"),
        "group_size": (False, _whole(1), "a positive number"),
        "symmetric": (True, _FLAG, "true or false"),
    },
}


def require_entries(entries: object) -> None:
    """Raise ValueError, naming the tensor and the key, unless `entries` are tensor name -> entry, with values of the right kinds."""
    if not isinstance(entries, Mapping):
        raise ValueError("quantization_config: tensors is no table of entries; download config.json again")
    for name, entry in entries.items():
        if wrong := _wrong(entry):
            raise ValueError(
                f"{name}: its entry in quantization_config is damaged ({wrong}); download config.json again"
            )


def _wrong(entry: Any) -> str | None:
    """The first thing that is wrong with an entry; None if nothing is. Keys that are not known are passed over."""
    if not isinstance(entry, Mapping):
        return "it is no table"
    method = entry.get("method")
    if not isinstance(method, str) or method not in _OF:
        return f"method {method!r} is not known"
    for key, (required, fits, wanted) in {**_EVERY, **_OF[method]}.items():
        if key in entry and not fits(entry[key]):
            return f"{key} is {str(entry[key])[:40]}, wanted {wanted}"
        if required and key not in entry:
            return f"{key} is missing"
    if entry.get("granularity") == "group" and "group_size" not in entry:
        return "group_size is missing"
    try:
        MatrixLocation.from_json(entry).require_rows(entry["shape"][0])
    except ValueError as error:
        return str(error)
    return None
