"""Jobs that hash files of outputs and of sources."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.integrity.digests import FileDigests, file_digests
from pipeline.checkpoints.tensor_io import file_differences
from pipeline.engine.task import JobContext, JobOutput
from pipeline.storage.store import Store


@dataclass(frozen=True)
class CheckFile:
    """Differences between a file of an output and its record in the manifest, one sentence each."""

    store: Store
    file: str
    record: Mapping[str, object]

    def run(self, context: JobContext) -> JobOutput[list[str]]:
        return JobOutput(file_differences(self.store, self.file, self.record))


@dataclass(frozen=True)
class HashFile:
    """sha256 of a file, and of each of its tensors."""

    store: Store
    file: str
    infos: tuple[TensorInfo, ...]

    def run(self, context: JobContext) -> JobOutput[FileDigests]:
        return JobOutput(file_digests(self.store, self.file, self.infos))
