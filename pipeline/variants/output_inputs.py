"""Comparison of files that an earlier run finished with the inputs of this run: source, Hessians and tuned values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.calibration.hessian_store import Hessians, require_same_source, source_of
from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint
from pipeline.checkpoints.integrity.digests import RangeDigests, known_ranges, manifest_digests, range_of
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.errors import OutputError
from pipeline.outputs.owned_files import REPORT
from pipeline.outputs.report import VERIFIED_SOURCE
from pipeline.outputs.report_rows import CompressedRow, MatrixResult, compressed_rows, measured_rows
from pipeline.outputs.transaction import Output
from pipeline.storage.store import FileRecord, Store
from pipeline.tuning.tuner import TunedValues


@dataclass(frozen=True)
class OutputInputs:
    """What this run computes an output from."""

    source: Checkpoint
    hessians: Hessians | None
    tuned: TunedValues | None = None

    def without_other_inputs(self, output: Output, planned: Mapping[str, frozenset[str]]) -> Output:
        """`output` without finished files that were computed from other inputs, or whose records lack a matrix.

        Args:
            planned: file -> the matrices that are compressed into it; a file of copied tensors has none. An earlier
                release may have finished other files.

        Raises:
            StoreError: the source of a finished file is not the one that was calibrated on.
        """
        digests = known_ranges(self.source.tensors)

        def is_reusable(file: str, record: FileRecord, rows: list[CompressedRow]) -> bool:
            if file not in planned or {row.name for row in rows} != planned[file]:
                return False
            if not rows:
                return self._has_source_digests(record.tensors)
            return all(self._has_same_inputs(row, digests) for row in rows)

        rows = {file: [MatrixResult.from_json(row).row for row in data] for file, (_, data) in output.finished.items()}
        finished = {file: pair for file, pair in output.finished.items() if is_reusable(file, pair[0], rows[file])}
        for file, (record, _) in finished.items():
            self.require_calibrated_source(record.tensors, rows[file])
        return replace(output, finished=finished)

    def require_calibrated_source(self, tensors: Mapping[str, str], rows: Sequence[CompressedRow]) -> None:
        """Raise StoreError if a file was computed from other bytes of the source than the calibration read.

        Args:
            tensors: tensor of the file -> sha256 of its bytes. Without `rows` they are copies of the source's.
            rows: matrices that were compressed into the file.
        """
        if self.hessians is None:
            return
        read = {byte_range: digest for row in rows for byte_range, digest in row.source_sha256.items()}
        if not rows:
            copied = {name: self.source.tensors[name] for name in tensors if name in self.source.tensors}
            read = {range_of(info): tensors[name] for name, info in copied.items() if info.fp8 is None}
        require_same_source(self.hessians.store, self._calibrated_source, read)

    def require_inputs_of(self, store: Store) -> None:
        """Raise OutputError if the source is verified and the complete output in `store` may come from other bytes."""
        digests = digests_of_source(self.source)
        if digests is None:
            return
        report = store.read_json(REPORT)
        if report.get(VERIFIED_SOURCE) == digests.name:
            return
        rows = list(measured_rows(report).values())
        calibrated = any((row.moments_sha256, row.calibration_tokens) != (None, None) for row in rows)
        if calibrated or "tuning" in report:
            raise _unverified(store, "its calibration read the source unverified")
        ranges = known_ranges(self.source.tensors)
        # A stored part of a matrix may have the matrix's name. The remaining rows of a fused tensor have the tensor's.
        compressed = {row[key] for row in compressed_rows(report) for key in ("name", "tensor") if row.get(key)}
        sha256 = {name: digest for name, (digest,) in manifest_digests(store.read_json(MANIFEST)).items()}
        copied = {name: digest for name, digest in sha256.items() if name not in compressed}
        if not (self._has_source_digests(copied) and all(self._has_same_inputs(row, ranges) for row in rows)):
            raise _unverified(store, "its source had other bytes")

    @cached_property
    def _calibrated_source(self) -> RangeDigests:
        return source_of(self.hessians.store) if self.hessians else {}

    def _has_source_digests(self, tensors: Mapping[str, str]) -> bool:
        """Whether copied tensors have the digests that are known of the source."""
        digests = {name: self.source.tensors[name].sha256 for name in tensors if name in self.source.tensors}
        return all(known[:1] in ((), (tensors[name],)) for name, known in digests.items())

    def _has_same_inputs(self, row: CompressedRow, digests: RangeDigests) -> bool:
        """Whether a matrix was compressed from the bytes, the Hessian and the tuned values of this run."""
        return (
            all(digests.get(byte_range, digest) == digest for byte_range, digest in row.source_sha256.items())
            and self._is_same(row.moments_sha256, self.hessians.sha256(row.name) if self.hessians else None)
            and self._is_same(row.tuned_sha256, self.tuned.sha256 if self.tuned else None)
        )

    def _is_same(self, recorded_digest: str | None, digest: str | None) -> bool:
        """Whether two digests agree. Earlier releases recorded none, which suffices unless the source is verified."""
        return digest is None or recorded_digest == digest or (recorded_digest is None and not self.source.verified)


def _unverified(store: Store, reason: str) -> OutputError:
    return OutputError(
        f"{store.root}: complete, but written without --verify-source, and {reason}; remove it, or choose another"
        " output"
    )
