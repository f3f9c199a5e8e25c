"""Jobs that hash files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.model.digests import FileDigests, digests_of
from pipeline.model.parts import differences
from pipeline.model.store import Store
from pipeline.model.tensors import TensorInfo
from pipeline.run.task import JobContext, JobOutput


@dataclass(frozen=True)
class CheckFile:
    """What is wrong with a file of an output, in sentences; `about` is its record in the manifest."""

    store: Store
    file: str
    about: Mapping[str, Any]

    def run(self, context: JobContext) -> JobOutput[list[str]]:
        return JobOutput(differences(self.store, self.file, self.about))


@dataclass(frozen=True)
class HashFile:
    """sha256 of a file, and of each of its tensors."""

    store: Store
    file: str
    infos: tuple[TensorInfo, ...]

    def run(self, context: JobContext) -> JobOutput[FileDigests]:
        return JobOutput(digests_of(self.store, self.file, self.infos))
