"""What an earlier run has finished, held against what this run reads: source, second moments and tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.calibration.hessian_store import Hessians, require_same_source, source_of
from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint
from pipeline.checkpoints.integrity.digests import RangeDigests, known_ranges, manifest_digests, range_of
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.errors import OutputError
from pipeline.outputs.owned_files import REPORT
from pipeline.outputs.report import compressed_rows
from pipeline.outputs.report_rows import CompressedRow, MatrixResult, measured_rows
from pipeline.outputs.transaction import Output
from pipeline.storage.store import FileRecord, Store
from pipeline.tuning.tuner import TunedValues

VERIFIED = "verified_source"  # in a report: name of the digests that all readings of the run were held against


@dataclass(frozen=True)
class Ingredients:
    """What an output is made of in this run."""

    source: Checkpoint
    hessians: Hessians | None
    tuned: TunedValues | None = None

    def kept(self, out: Output) -> Output:
        """An output without the finished files that were made of something else; StoreError as `require_calibrated_on`."""
        known = known_ranges(self.source.tensors)

        def is_of(record: FileRecord, rows: list[CompressedRow]) -> bool:
            return self._copied(record.tensors) if not rows else all(self._is_of(row, known) for row in rows)

        rows = {file: [MatrixResult.from_json(row).row for row in found] for file, (_, found) in out.finished.items()}
        finished = {file: own for file, own in out.finished.items() if is_of(own[0], rows[file])}
        for file, (record, _) in finished.items():
            self.require_calibrated_on(record.tensors, rows[file])
        return replace(out, finished=finished)

    def require_calibrated_on(self, tensors: Mapping[str, str], rows: Sequence[CompressedRow]) -> None:
        """Raise StoreError if a file was made of other bytes of the source than the calibration has read.

        Args:
            tensors: digests of what stands in the file, by name; as in the source, if there are no rows.
            rows: of the matrices that were compressed into it.
        """
        if self.hessians is None:
            return
        read = {where: digest for row in rows for where, digest in row.source_sha256.items()}
        if not rows:
            own = {name: self.source.tensors[name] for name in tensors if name in self.source.tensors}
            read = {range_of(info): tensors[name] for name, info in own.items() if info.fp8 is None}
        require_same_source(self.hessians.store, self._calibrated_on, read)

    @cached_property
    def _calibrated_on(self) -> RangeDigests:
        return source_of(self.hessians.store) if self.hessians else {}

    def _copied(self, tensors: Mapping[str, str]) -> bool:
        """Whether tensors that stayed as they are have the digests that are known of them."""
        own = {name: self.source.tensors[name].sha256 for name in tensors if name in self.source.tensors}
        return all(digests[:1] in ((), (tensors[name],)) for name, digests in own.items())

    def _is_of(self, row: CompressedRow, known: RangeDigests) -> bool:
        """Whether a compressed matrix was made of these."""
        return (
            all(known.get(where, digest) == digest for where, digest in row.source_sha256.items())
            and self._same(row.moments_sha256, self.hessians.sha256(row.name) if self.hessians else None)
            and self._same(row.tuned_sha256, self.tuned.sha256 if self.tuned else None)
        )

    def _same(self, then: str | None, now: str | None) -> bool:
        """Whether a digest is the present one; a row of an earlier release has none, which is not enough for a verified source."""
        return now is None or then == now or (then is None and not self.source.verified)

    def require_made_of(self, store: Store) -> None:
        """Raise OutputError if a complete output was made of other bytes than a verified source has, or may have been."""
        if (known := digests_of_source(self.source)) is None:
            return
        report, manifest = store.read_json(REPORT), store.read_json(MANIFEST)
        if report.get(VERIFIED) == known.name:
            return
        ranges = known_ranges(self.source.tensors)
        rows = list(measured_rows(report).values())
        # a part of what is stored of a matrix may have its name; of a fused tensor the rest is stored
        made = {row[key] for row in compressed_rows(report) for key in ("name", "tensor") if row.get(key)}
        copied = {name: digest for name, (digest,) in manifest_digests(manifest).items() if name not in made}
        calibrated = "tuning" in report or any(
            (row.moments_sha256, row.calibration_tokens) != (None, None) for row in rows
        )
        if calibrated or not (self._copied(copied) and all(self._is_of(row, ranges) for row in rows)):
            raise OutputError(
                f"{store.root}: complete, but made without --verify-source, and"
                f" {'of a calibration that read the source unverified' if calibrated else 'of other bytes'}; remove it, or choose"
                " another output"
            )
