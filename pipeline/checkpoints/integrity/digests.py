"""Digests of tensors and files. Bytes that differ from their known digest are never used."""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.errors import CheckpointError, ConfigError, StoreError
from pipeline.storage.files import BytesLike
from pipeline.storage.store import Store

# Range of a file, as `range_of` writes it -> sha256 of the bytes that were read.
RangeDigests = dict[str, str]
# A line of sha256sum.
_LINE = re.compile(r"(?P<sha256>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


def range_of(info: TensorInfo) -> str:
    """Return the byte range of a stored tensor as FILE:START-END."""
    return f"{info.file}:{info.start}-{info.start + info.nbytes}"


def ranges_of(matrix: MatrixInfo) -> list[str]:
    """Return all ranges that are read for a matrix."""
    return [range_of(stored) for stored in matrix.read_from.stored]


def require_same_ranges(location: str, before: RangeDigests, now: RangeDigests) -> None:
    """Raise StoreError if a range has other bytes than before."""
    if differing := sorted(name for name in before.keys() & now.keys() if before[name] != now[name]):
        raise StoreError(
            f"{location}: two readings of {differing[0]} differ: the file was changed, or its disk, the network or a"
            " memory damages data; check them, then run the same command again"
        )


def verify_pieces(
    store: Store, info: TensorInfo, pieces: Iterable[BytesLike], digests: RangeDigests | None = None
) -> Iterator[BytesLike]:
    """Yield the pieces of a stored tensor, then compare their digest with the known one.

    Args:
        digests: receives the digest.

    Raises:
        StoreError: after the last piece, if the digests differ.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if digests is not None:
        digests[range_of(info)] = digest.hexdigest()
    if info.sha256 and info.sha256[0] != digest.hexdigest():
        raise StoreError(
            f"{store.root}/{info.file}: {info.name}: the bytes do not match the known sha256; they changed on the disk"
            " or on the way here: check the file by `swsc verify`, or download it again"
        )


@dataclass(frozen=True)
class FileDigests:
    """sha256 of a file and of its tensors.

    Attributes:
        tensors: name -> sha256 of the tensor, then of each matrix if the tensor stacks experts.
    """

    sha256: str
    tensors: Mapping[str, tuple[str, ...]]


def file_digests(store: Store, file: str, infos: Iterable[TensorInfo]) -> FileDigests:
    """Hash a file and its tensors, reading it once from beginning to end."""
    file_digest, size, position = hashlib.sha256(), store.size(file), 0
    tensors: dict[str, tuple[str, ...]] = {}

    def read_to(end: int) -> Iterator[bytearray]:
        nonlocal position
        for piece in store.stream(file, position, end - position):
            file_digest.update(piece)
            yield piece
        position = end

    for info in sorted(infos, key=lambda info: (info.start, info.start + info.nbytes, info.name)):
        deque(read_to(info.start), maxlen=0)
        count = _matrix_count(info)
        tensor_digest, matrices = hashlib.sha256(), []
        for number in range(1, count + 1):
            matrix_digest = hashlib.sha256()
            for piece in read_to(info.start + info.nbytes * number // count):
                tensor_digest.update(piece)
                matrix_digest.update(piece)
            matrices.append(matrix_digest.hexdigest())
        tensors[info.name] = (tensor_digest.hexdigest(), *(matrices if count > 1 else ()))
    deque(read_to(size), maxlen=0)
    return FileDigests(file_digest.hexdigest(), tensors)


def _matrix_count(info: TensorInfo) -> int:
    """Return the number of matrices that are read one by one."""
    return info.shape[0] if len(info.shape) == 3 and info.shape[0] and info.nbytes else 1


def with_digests(infos: Mapping[str, TensorInfo], digests: Mapping[str, tuple[str, ...]]) -> dict[str, TensorInfo]:
    """Attach known digests, which readers compare, to tensors by their names in the files."""
    return {name: _with_digest(info, digests) for name, info in infos.items()}


def _with_digest(info: TensorInfo, digests: Mapping[str, tuple[str, ...]]) -> TensorInfo:
    if info.fp8 is None:
        return replace(info, sha256=digests.get(info.name, ()))
    fp8 = replace(
        info.fp8, weight=_with_digest(info.fp8.weight, digests), scales=_with_digest(info.fp8.scales, digests)
    )
    return replace(info, fp8=fp8)


def known_ranges(tensors: Mapping[str, TensorInfo]) -> RangeDigests:
    """Return the known digests of the ranges by which tensors are read."""
    digests: RangeDigests = {}
    for info in tensors.values():
        for stored in info.stored:
            if stored.sha256:
                digests[range_of(stored)] = stored.sha256[0]
            for number in range(len(stored.sha256) - 1):
                matrix = stored.expert(number)
                digests[range_of(matrix)] = matrix.sha256[0]
    return digests


def manifest_digests(manifest: Any) -> dict[str, tuple[str, ...]]:
    """Return tensor -> (sha256,) from the manifest of an output; ValueError if the manifest is malformed."""
    try:
        files = [file.get("tensors", {}) for file in manifest["files"].values()]
        return {str(name): (str(digest),) for tensors in files for name, digest in tensors.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no list of files ({error})") from None


def parse_sha256sums(text: str, location: str) -> dict[str, str]:
    """Parse the output of `sha256sum` into file name -> sha256; ConfigError names an invalid line.

    Args:
        location: path of the list, for messages.
    """
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if (match := _LINE.fullmatch(line.strip())) is None:
            raise ConfigError(
                f"{location}: line {number} is not '<sha256>  <file>'; write it by `sha256sum *.safetensors`"
            )
        sums[match["name"].removeprefix("./")] = match["sha256"].lower()
    return sums


def match_file_names(sums: Mapping[str, str], files: Iterable[str]) -> dict[str, str]:
    """Return sums by the names of `files`, if all their names in `sums` have the same path in front.

    `sha256sum models/m/*.safetensors` writes such paths. Other sums are returned unchanged.
    """
    files = set(files)
    if files & sums.keys():
        return dict(sums)
    folders = {path.removesuffix(file) for file in files for path in sums if path.endswith(f"/{file}")}
    complete = [folder for folder in folders if all(folder + file in sums for file in files)]
    return {file: sums[complete[0] + file] for file in files} if len(complete) == 1 else dict(sums)


def require_digest_of_each(digests: Mapping[str, str], files: Iterable[str], location: str) -> None:
    """Raise ConfigError if a file has no known sha256."""
    if missing := sorted(set(files) - digests.keys()):
        raise ConfigError(
            f"{location}: no sha256 of {missing[0]} ({len(missing)} files in all); list every file of weights"
        )


def require_file_digest(location: str, file: str, actual: str, expected: str) -> None:
    """Raise CheckpointError if the sha256 of a file is not the known one."""
    if actual != expected:
        raise CheckpointError(
            f"{location}/{file}: expected sha256 {expected}, got {actual}; the file is damaged, or not the published"
            " one: download it again"
        )
