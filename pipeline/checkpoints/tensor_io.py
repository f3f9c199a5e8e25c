"""Reads tensors from checkpoints, and writes them to safetensors files of outputs and caches.

Tensors are passed on as named bytes. numpy buffers cross Ray's object store without a copy (5 GB/s against 0.7 GB/s for
torch tensors), and numpy needs no dtype for bytes of bfloat16 or fp8.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.architectures.tensor_info import TORCH_TO_SAFETENSORS, TensorInfo
from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.integrity.digests import RangeDigests, verify_pieces
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.errors import CheckpointError
from pipeline.storage.files import BytesLike
from pipeline.storage.lease import Ticket
from pipeline.storage.paths import is_hub_blob
from pipeline.storage.records import FinishedFileRecord, parse_record, read_cached
from pipeline.storage.store import FileRecord, Store
from swsc_core.storage.json_fields import JsonObject
from swsc_core.storage.safetensors_header import BITS, DTYPES, build_header

if TYPE_CHECKING:  # a process that commits files starts faster without torch
    from torch import Tensor

# Folder with a record of each finished file.
FINISHED_FOLDER = ".swsc/done"
# Name of a tensor, and its bytes in pieces.
_TensorPieces = tuple[str, Iterable[BytesLike]]


@dataclass(frozen=True)
class StoredTensor:
    """The bytes of a tensor.

    Attributes:
        dtype: name of the dtype in safetensors.
        data: uint8 [nbytes].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class Payload:
    """The tensors of one output file, and the rows of its record."""

    parts: tuple[StoredTensor, ...]
    rows: tuple[dict[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.data.nbytes for part in self.parts)


def to_stored_tensor(name: str, tensor: "Tensor") -> StoredTensor:
    """Convert a tensor on any device."""
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    dtype = TORCH_TO_SAFETENSORS[str(tensor.dtype).removeprefix("torch.")]
    return StoredTensor(name, dtype, tuple(tensor.shape), flat.numpy())


def to_tensor(part: StoredTensor) -> "Tensor":
    """Return a CPU tensor in aligned memory of its own.

    Bytes from the object store are read-only and may be unaligned.
    """
    import torch

    return _tensor(torch.tensor(part.data), part.dtype, part.shape)


def read_tensor(store: Store, info: TensorInfo, digests: RangeDigests | None = None) -> "Tensor":
    """Read one tensor by its byte range into aligned memory; an fp8 weight is dequantized.

    Args:
        digests: receives the digests of the ranges that were read.

    Raises:
        StoreError: the bytes differ from their known digest.
    """
    if info.fp8 is None:
        data = store.read(info.file, info.start, info.nbytes)
        if info.sha256 or digests is not None:
            deque(verify_pieces(store, info, [data], digests), maxlen=0)
        return _tensor(_aligned(data), info.dtype, info.shape)
    from swsc_core.storage.fp8 import dequantize_blocks

    weight, scales = (read_tensor(store, stored, digests) for stored in info.stored)
    return dequantize_blocks(weight, scales.expand(-(-len(weight) // info.fp8.block[0]), -1), info.fp8.block)


def read_matrix(store: Store, matrix: MatrixInfo, digests: RangeDigests | None = None) -> "Tensor":
    """Read a matrix [outputs, inputs], of stacked experts only its own; StoreError as from `read_tensor`."""
    from swsc_core.storage.row_blocks import apply_view

    return apply_view(read_tensor(store, matrix.read_from, digests), matrix.location.transposed, matrix.rows)


def _aligned(data: bytearray) -> "Tensor":
    """Copy bytes to aligned memory, uint8 [nbytes]."""
    import torch

    from swsc_core import aligned

    return aligned(torch.frombuffer(data, dtype=torch.uint8)) if data else torch.empty(0, dtype=torch.uint8)


def _tensor(data: "Tensor", dtype: str, shape: tuple[int, ...]) -> "Tensor":
    import torch

    kind = getattr(torch, DTYPES[dtype][0])
    if not data.numel():  # view and reshape fail for strides of 0
        return torch.empty(shape, dtype=kind)
    return data.view(kind).reshape(shape)


def commit(ticket: Ticket, file: str, payload: Payload) -> FileRecord:
    """Write a payload as the safetensors file `file`, then the record that the file is finished.

    Raises:
        RunError: this node does not see the output directory, or another run has taken over.
    """
    header, parts = _file_of(payload.parts)
    return _write(ticket, file, header, ((part.name, [part.data.data]) for part in parts), payload.rows)


def file_sha256(parts: Iterable[StoredTensor]) -> str:
    """Return the sha256 of the file that `commit` would write for these tensors."""
    header, ordered = _file_of(parts)
    digest = hashlib.sha256(header)
    for part in ordered:
        digest.update(part.data.data)
    return digest.hexdigest()


def _file_of(parts: Iterable[StoredTensor]) -> tuple[bytes, list[StoredTensor]]:
    """The header of a file of these tensors, and the tensors in its order."""
    # Wide dtypes first, so that all tensors are aligned.
    ordered = sorted(parts, key=lambda part: (-DTYPES[part.dtype][1], part.name))
    return build_header((part.name, part.dtype, part.shape, part.data.nbytes) for part in ordered), ordered


def copy_tensors(source: Store, infos: Sequence[TensorInfo], ticket: Ticket, file: str) -> FileRecord:
    """Copy tensors of a source checkpoint into one new file.

    At most one tensor is in memory, and only if it is dequantized.
    """
    ordered = sorted(infos, key=lambda info: (-BITS[info.dtype], info.file, info.start))
    header = build_header((info.name, info.dtype, info.shape, info.nbytes) for info in ordered)
    return _write(ticket, file, header, ((info.name, _pieces(source, info)) for info in ordered), ())


def _pieces(source: Store, info: TensorInfo) -> Iterator[BytesLike]:
    """Yield the bytes of a tensor as they are stored; an fp8 weight is dequantized."""
    if info.fp8 is None:
        pieces = source.stream(info.file, info.start, info.nbytes)
        yield from verify_pieces(source, info, pieces) if info.sha256 else pieces
    else:
        yield to_stored_tensor(info.name, read_tensor(source, info)).data.data


def _write(
    ticket: Ticket, file: str, header: bytes, tensors: Iterable[_TensorPieces], rows: Sequence[JsonObject]
) -> FileRecord:
    """Write a safetensors file of named tensors, each in pieces, and the record with its digests."""
    digests: dict[str, str] = {}

    def content() -> Iterator[BytesLike]:
        yield header
        for name, pieces in tensors:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
                yield piece
            digests[name] = digest.hexdigest()
        ticket.require()  # writing may have taken long, and the file appears after this

    ticket.require()
    record = replace(ticket.store.write(file, content()), tensors=digests)
    ticket.require()
    ticket.store.write_json(
        f"{FINISHED_FOLDER}/{file}.json", {**record.to_json(), "rows": list(rows), "run": ticket.run}
    )
    return record


def finished_sha256(store: Store, file: str) -> str:
    """Return the sha256 of a file in a cache from its record; OutputError if the record is damaged."""
    name = f"{FINISHED_FOLDER}/{file}.json"
    return read_cached(store, name, lambda: parse_record(FinishedFileRecord, store.read_json(name)).sha256)


def link_problem(store: Store, file: str) -> str | None:
    """Return a message if a file of an output is a link, or behind one: it is not read then. None for other files."""
    return (
        f"{file} is a link, not a file of the output" if store.is_link(file) and not is_hub_blob(store, file) else None
    )


def file_differences(store: Store, file: str, recorded: Mapping[str, Any]) -> list[str]:
    """Compare a file with its record in a manifest, of size, sha256 and the digests of its tensors.

    Returns:
        A message for each difference; empty if the file is intact.
    """
    expected = FileRecord.from_json(file, recorded)
    if problem := link_problem(store, file):
        return [problem]
    if not store.exists(file):
        return [f"{file} is missing"]
    if (size := store.size(file)) != expected.size:
        return [f"{file} has {size} bytes, expected {expected.size}"]
    if store.sha256(file) == expected.sha256:
        return []
    return [f"{file}: {part} differs" for part in _changed_parts(store, file, expected.tensors)]


def _changed_parts(store: Store, file: str, digests: Mapping[str, str]) -> list[str]:
    """Return the names of the tensors whose bytes changed, or "header", or "content" for files without tensors."""
    if not digests:
        return ["content"]
    try:
        infos = {info.name: info for info in read_header(store, file)[1]}
    except CheckpointError:
        return ["header"]
    if infos.keys() != digests.keys():
        return ["header"]
    changed = [name for name, digest in digests.items() if _sha256(store, infos[name]) != digest]
    return changed or ["header"]


def _sha256(store: Store, info: TensorInfo) -> str:
    digest = hashlib.sha256()
    for piece in store.stream(info.file, info.start, info.nbytes):
        digest.update(piece)
    return digest.hexdigest()
