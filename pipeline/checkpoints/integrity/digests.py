"""Digests of what is read: where it is known what a tensor's bytes are, other bytes are never used."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.errors import CheckpointError, ConfigError, StoreError
from pipeline.storage.files import BytesLike
from pipeline.storage.store import Store

RangeDigests = dict[str, str]  # range of a file, as `range_of` writes it -> sha256 of the bytes that were read there
_LINE = re.compile(r"(?P<sha256>[0-9a-fA-F]{64}) [ *](?P<name>.+)")  # as sha256sum writes it


def range_of(info: TensorInfo) -> str:
    """FILE:START-END of what lies in a file."""
    return f"{info.file}:{info.start}-{info.start + info.nbytes}"


def ranges_of(matrix: MatrixInfo) -> list[str]:
    """All ranges that are read for a matrix."""
    return [range_of(stored) for stored in matrix.read_from.stored]


def require_same_ranges(what: str, before: RangeDigests, now: RangeDigests) -> None:
    """Raise StoreError if a range was read as other bytes before."""
    if differing := sorted(where for where in before.keys() & now.keys() if before[where] != now[where]):
        raise StoreError(
            f"{what}: {differing[0]} was read twice, as different bytes: the file was changed, or its disk, the network or a memory"
            " corrupts what it holds; look at them, then run the same command again"
        )


def verify_pieces(
    store: Store, info: TensorInfo, pieces: Iterable[BytesLike], seen: RangeDigests | None = None
) -> Iterator[BytesLike]:
    """The pieces of a tensor that lies in a file; what they were is noted in `seen`.

    Raises:
        StoreError: after the last one, if it is known what they are, and they are not.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if seen is not None:
        seen[range_of(info)] = digest.hexdigest()
    if info.sha256 and info.sha256[0] != digest.hexdigest():
        raise StoreError(
            f"{store.root}/{info.file}: {info.name}: other bytes than those that its sha256 was taken of; they changed on the disk"
            " or on the way here: check the file by `swsc verify`, or get it again"
        )


@dataclass(frozen=True)
class FileDigests:
    """sha256 of a file, and of each tensor in it: of the whole and, where it is a stack, of each of its matrices."""

    sha256: str
    tensors: Mapping[str, tuple[str, ...]]


def file_digests(store: Store, file: str, infos: Iterable[TensorInfo]) -> FileDigests:
    """Read a file once from end to end."""
    ends = sorted((info.start, info.start + info.nbytes, info.name, _matrices(info)) for info in infos)
    whole, size, position = hashlib.sha256(), store.size(file), 0
    found: dict[str, tuple[str, ...]] = {}

    def through(end: int) -> Iterator[bytearray]:
        nonlocal position
        for piece in store.stream(file, position, end - position):
            whole.update(piece)
            yield piece
        position = end

    for start, end, name, count in ends:
        for _ in through(start):
            pass
        tensor, matrices = hashlib.sha256(), []
        for number in range(1, count + 1):
            matrix = hashlib.sha256()
            for piece in through(start + (end - start) * number // count):
                tensor.update(piece)
                matrix.update(piece)
            matrices.append(matrix.hexdigest())
        found[name] = (tensor.hexdigest(), *(matrices if count > 1 else ()))
    for _ in through(size):
        pass
    return FileDigests(whole.hexdigest(), found)


def _matrices(info: TensorInfo) -> int:
    """Number of parts that a tensor may be read in."""
    return info.shape[0] if len(info.shape) == 3 and info.shape[0] and info.nbytes else 1


def with_digests(infos: Mapping[str, TensorInfo], known: Mapping[str, tuple[str, ...]]) -> dict[str, TensorInfo]:
    """Tensors that are held against `known` when they are read, by their names in the files."""
    return {name: _with(info, known) for name, info in infos.items()}


def _with(info: TensorInfo, known: Mapping[str, tuple[str, ...]]) -> TensorInfo:
    if info.fp8 is None:
        return replace(info, sha256=known.get(info.name, ()))
    fp8 = replace(info.fp8, weight=_with(info.fp8.weight, known), scales=_with(info.fp8.scales, known))
    return replace(info, fp8=fp8)


def known_ranges(tensors: Mapping[str, TensorInfo]) -> RangeDigests:
    """Digests of the ranges that tensors are read by, as far as they are known."""
    found: RangeDigests = {}
    for info in tensors.values():
        for stored in info.stored:
            if stored.sha256:
                found[range_of(stored)] = stored.sha256[0]
            for number in range(len(stored.sha256) - 1):
                matrix = stored.expert(number)
                found[range_of(matrix)] = matrix.sha256[0]
    return found


def manifest_digests(manifest: Any) -> dict[str, tuple[str, ...]]:
    """What an output's manifest says of its tensors, by their names; ValueError if it says it in no way that is known."""
    try:
        files = [about.get("tensors", {}) for about in manifest["files"].values()]
        return {str(name): (str(digest),) for tensors in files for name, digest in tensors.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no list of files ({error})") from None


def parse_sha256sums(text: str, where: str) -> dict[str, str]:
    """File name -> sha256, from what `sha256sum` writes; ConfigError that names a line which is none of it."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if (match := _LINE.fullmatch(line.strip())) is None:
            raise ConfigError(
                f"{where}: line {number} is not '<sha256>  <file>'; write it by `sha256sum *.safetensors`"
            )
        found[match["name"].removeprefix("./")] = match["sha256"].lower()
    return found


def match_file_names(sums: Mapping[str, str], files: Iterable[str]) -> dict[str, str]:
    """Sums by the names of `files`, which lie in one directory: as they are, or those of a path to it.

    `sha256sum models/m/*.safetensors` names them all by one such path.
    """
    files = set(files)
    if files & sums.keys():
        return dict(sums)
    above = {path.removesuffix(file) for file in files for path in sums if path.endswith(f"/{file}")}
    whole = [folder for folder in above if all(folder + file in sums for file in files)]
    return {file: sums[whole[0] + file] for file in files} if len(whole) == 1 else dict(sums)


def require_digest_of_each(known: Mapping[str, str], files: Iterable[str], where: str) -> None:
    """Raise ConfigError if there is a file without a hash."""
    if missing := sorted(set(files) - known.keys()):
        raise ConfigError(
            f"{where}: no sha256 of {missing[0]} ({len(missing)} files in all); give one of each weight file"
        )


def require_file_digest(location: str, file: str, found: str, known: str) -> None:
    """Raise CheckpointError if a file is not the one that is known."""
    if found != known:
        raise CheckpointError(
            f"{location}/{file}: sha256 {found}, wanted {known}: not the file that was published, or damaged; get it again"
        )
