"""Job that hashes a file of a source."""

from dataclasses import dataclass

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.integrity.digests import FileDigests, file_digests
from pipeline.engine.task import JobContext, JobOutput
from pipeline.storage.store import Store


@dataclass(frozen=True)
class HashFile:
    """sha256 of a file, and of each of its tensors."""

    store: Store
    file: str
    infos: tuple[TensorInfo, ...]

    def run(self, context: JobContext) -> JobOutput[FileDigests]:
        return JobOutput(file_digests(self.store, self.file, self.infos))
