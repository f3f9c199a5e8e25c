"""Jobs of compression: compress a layer, compress one matrix in several variants, copy tensors."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.calibration.hessian_store import Hessians
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.tensor_io import Payload, StoredTensor, copy_tensors, to_stored_tensor
from pipeline.compression.layer_output import LayerParts, matrix_result
from pipeline.device import requires_new_process, vector_instructions
from pipeline.engine.malloc import peak_rss, return_freed_blocks
from pipeline.engine.task import JobContext, JobOutput, Task
from pipeline.errors import UncompressibleWeight
from pipeline.models.matrix_reader import MatrixReader, SourceMatrix, read_source_matrix
from pipeline.outputs.report_rows import MatrixResult
from pipeline.planning.tasks import CopyTask, LayerTask
from pipeline.planning.time_model import copying_seconds
from pipeline.storage.lease import Ticket
from pipeline.storage.store import FileRecord, Store
from swsc_core import Encoded, encode
from swsc_core.checks import InvalidWeightError
from swsc_core.method.spec import Spec


@dataclass(frozen=True)
class CompressionVariant:
    """One way to compress a matrix.

    Attributes:
        specs: candidates; the result with the smallest error is stored.
        seed: of the run.
        storage_dtype: torch name of the dtype of stored values; None: the dtype of the weight.
        hessians: needed by specs whose metric is "activations".
    """

    specs: tuple[Spec, ...]
    seed: int
    storage_dtype: str | None = None
    hessians: Hessians | None = None


@dataclass(frozen=True)
class LayerReport:
    """Measurements of a finished layer.

    Attributes:
        results: report row and config.json entry of each matrix.
        peak_rss: peak resident memory of the worker so far, in bytes.
        kernels: vector instructions of the worker's CPU, or its GPU.
    """

    results: tuple[MatrixResult, ...]
    peak_rss: int
    kernels: str


@dataclass(frozen=True)
class CompressionFailure:
    """Error of a matrix that could not be compressed in one of several variants."""

    name: str
    error: str


@dataclass(frozen=True)
class CompressLayer:
    """Compress the matrices of one layer. The payload is the layer's file.

    Attributes:
        form: "swsc" for compressed matrices, "dense" for restored weights.

    Raises:
        UncompressibleWeight: a weight holds NaN or Inf.
    """

    source: Store
    layer: LayerTask
    form: str
    seed: int
    storage_dtype: str | None
    hessians: Hessians | None

    def run(self, context: JobContext) -> JobOutput[LayerReport]:
        reader, parts, results = MatrixReader(self.source, context.device), LayerParts(self.form), []
        for info, specs in self.layer.items:
            variant = CompressionVariant(specs, self.seed, self.storage_dtype, self.hessians)
            encoded, result = compress_matrix(reader.read(info), variant, context.device)
            parts.add(info, encoded)
            results.append(result)
        return layer_output(parts, self.layer, reader, results, context.device)


@dataclass(frozen=True)
class CompressVariants:
    """Read one matrix and compress it in several variants. Each variant gives one payload and one result in the value.

    A variant that fails gives a `CompressionFailure` and an empty payload. The others continue, unless the failure
    leaves the GPU unusable; that error is raised.
    """

    source: Store
    info: MatrixInfo
    variants: tuple[CompressionVariant, ...]

    def run(self, context: JobContext) -> JobOutput[tuple[MatrixResult | CompressionFailure, ...]]:
        matrix = read_source_matrix(self.source, self.info, context.device)
        outputs = [compress_variant(matrix, variant, context.device) for variant in self.variants]
        return JobOutput(tuple(result for result, _ in outputs), tuple(payload for _, payload in outputs))


@dataclass(frozen=True)
class CopyTensors:
    """Copy tensors that are not compressed into their file, as a stream."""

    source: Store
    copy: CopyTask
    ticket: Ticket

    def run(self, context: JobContext) -> JobOutput[FileRecord]:
        return JobOutput(copy_tensors(self.source, self.copy.infos, self.ticket, self.copy.file))


def compress_variant(
    matrix: SourceMatrix, variant: CompressionVariant, device: str
) -> tuple[MatrixResult | CompressionFailure, Payload]:
    """Result and stored parts of a matrix, or a `CompressionFailure` and an empty payload.

    An error that leaves the GPU unusable is raised.
    """
    name = matrix.info.name
    try:
        encoded, result = compress_matrix(matrix, variant, device)
    except Exception as error:
        if requires_new_process(error):
            raise
        return CompressionFailure(name, f"{name}: {error}"), Payload(())
    return result, Payload(_parts(encoded), (result.to_json(),))


def _parts(encoded: Encoded) -> tuple[StoredTensor, ...]:
    return tuple(to_stored_tensor(part, tensor) for part, tensor in encoded.tensors.items())


def compress_matrix(matrix: SourceMatrix, variant: CompressionVariant, device: str) -> tuple[Encoded, MatrixResult]:
    """Compress one matrix, and describe it by its report row and entry. Raises UncompressibleWeight for NaN or Inf."""
    started = time.perf_counter()
    info = matrix.info
    # Vector quantization of segments fragments the heap. K-Means over whole channels does not, and would take a third
    # more time.
    if any(spec.cuts_channels for spec in variant.specs):
        return_freed_blocks(info.count)
    try:
        encoded = _encode_matrix(matrix, variant, device)
    except InvalidWeightError as error:
        raise UncompressibleWeight(f"{matrix.path}: {error}") from None
    return encoded, matrix_result(matrix, encoded, time.perf_counter() - started, variant.hessians)


def _encode_matrix(matrix: SourceMatrix, variant: CompressionVariant, device: str) -> Encoded:
    name = matrix.info.name
    dtype = getattr(torch, variant.storage_dtype) if variant.storage_dtype else None
    metric = variant.hessians.metric(name, device)[0] if variant.hessians else None
    return encode(matrix.weight, variant.specs, name=name, seed=variant.seed, storage_dtype=dtype, metric=metric)


def layer_output(
    parts: LayerParts, layer: LayerTask, reader: MatrixReader, results: Sequence[MatrixResult], device: str
) -> JobOutput[LayerReport]:
    """The file and the report of a layer whose compressed matrices `parts` already holds."""
    for fused in layer.fused:
        parts.add_remaining_rows(fused, reader.read_fused)
    report = LayerReport(tuple(results), peak_rss(), vector_instructions(device))
    return JobOutput(report, (Payload(parts.parts, tuple(result.to_json() for result in results)),))


def copy_task(source: Store, copy: CopyTask, ticket: Ticket) -> Task[Any]:
    """A task that copies tensors into one file of the output."""
    job = CopyTensors(source, copy, ticket)
    return Task(copy.file, job, f"copy to {copy.file}", work=copying_seconds(copy.nbytes), nbytes=copy.nbytes)
