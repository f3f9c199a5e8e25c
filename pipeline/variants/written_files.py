"""Records, measurements and worker figures of the files that a compression writes."""

from pipeline.compression.job import LayerReport
from pipeline.engine.task import TaskResult
from pipeline.outputs.existing_output import FinishedFiles
from pipeline.outputs.report_rows import MatrixResult
from pipeline.storage.store import FileRecord
from pipeline.variants.output_inputs import OutputInputs


class WrittenFiles:
    """The files of one output, collected as their tasks end.

    Attributes:
        records: file -> its record.
        results: matrix -> its report row and entry.
        peak_rss: worker -> its largest resident memory, in bytes.
        kernels: vector instructions or GPUs that computed the layers.
        earlier: number of files that an earlier run finished.
    """

    def __init__(self, inputs: OutputInputs, finished: FinishedFiles) -> None:
        """Start with the files that an earlier run finished."""
        self._inputs = inputs
        self.records = {file: record for file, (record, _) in finished.items()}
        self.results = {row["name"]: MatrixResult.from_json(row) for _, rows in finished.values() for row in rows}
        self.peak_rss: dict[str, int] = {}
        self.kernels: set[str] = set()
        self.earlier = len(finished)

    def add(self, done: TaskResult[LayerReport | FileRecord]) -> None:
        """Add the file of one task; StoreError if the source changed between calibration and compression."""
        if isinstance(done.value, FileRecord):
            self._add_record(done.value, ())
            return
        assert done.record is not None  # the engine commits the payload of a layer
        layer = done.value
        self._add_record(done.record, layer.results)
        self.results.update({result.row.name: result for result in layer.results})
        self.kernels.add(layer.kernels)
        worker = str(done.worker)
        self.peak_rss[worker] = max(layer.peak_rss, self.peak_rss.get(worker, 0))

    def _add_record(self, record: FileRecord, results: tuple[MatrixResult, ...]) -> None:
        self._inputs.require_calibrated_source(record.tensors, [result.row for result in results])
        self.records[record.name] = record
