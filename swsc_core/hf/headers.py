"""Headers of safetensors files, held against what config.json says, before a byte of a weight is read.

transformers warns of tensors that are missing and goes on with uninitialised memory, and older releases accept wrong shapes
where a quantizer is present. Here a directory that is not whole is refused, and the line says what is wrong with which tensor.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swsc_core.compressed.config_json import part_name
from swsc_core.compressed.entry import Entry
from swsc_core.storage import safetensors_header

Header = tuple[str, tuple[int, ...]]  # dtype as safetensors spells it, shape


def read_headers(files: Iterable[str]) -> dict[str, Header]:
    """Tensor name -> dtype and shape, of all `files`.

    Raises:
        ValueError: a file that is cut short, is no safetensors file, or holds a tensor that another one holds too.
    """
    found: dict[str, Header] = {}
    for file in files:
        for name, header in _read_header(Path(file)).items():
            if name in found:
                raise ValueError(f"{file}: {name} stands in another file, too; compress or download it again")
            found[name] = header
    return found


def _read_header(path: Path) -> dict[str, Header]:
    def read(start: int, count: int) -> bytes:
        file.seek(start)
        return file.read(count)

    try:
        with path.open("rb") as file:
            entries = safetensors_header.read_header(read, path.stat().st_size)[1]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error}); run `swsc verify`, then compress or download it again"
        ) from None
    return {entry.name: (entry.dtype, entry.shape) for entry in entries}


def require_parts(headers: Mapping[str, Header], entries: Mapping[str, Entry], where: str) -> None:
    """Raise ValueError unless all parts of every entry are there, of the shapes and kinds that it states."""
    for name, entry in entries.items():
        for part, (shape, is_float) in entry.part_shapes().items():
            _require_part(headers, part_name(name, part), shape, is_float, where)
    known = {part_name(name, part) for name in entries for part in ("labels", "zero_points")}
    for stored, (dtype, _) in headers.items():
        if stored.endswith((".labels", ".zero_points")) and dtype == "U8" and stored not in known:
            raise ValueError(f"{where}: {stored} is stored, and config.json has no entry for it; download it again")


def require_rest(headers: Mapping[str, Header], tensor: str, layer: Any, where: str) -> None:
    """Raise ValueError unless the rows of a joined tensor that are in no piece are there."""
    _require_part(headers, tensor, tuple(layer.weight.shape), True, where)


def _require_part(
    headers: Mapping[str, Header], stored: str, shape: tuple[int, ...], is_float: bool, where: str
) -> None:
    if stored not in headers:
        raise ValueError(f"{where}: {stored} is missing; compress or download it again")
    dtype, found = headers[stored]
    if found != shape or dtype.startswith(("F", "BF")) != is_float or (not is_float and dtype != "U8"):
        kind = "floating point values" if is_float else "U8"
        raise ValueError(f"{where}: {stored} is {dtype} {list(found)}, wanted {kind} {list(shape)}; download it again")
