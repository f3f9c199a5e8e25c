"""Parts of a payload whose first reading hangs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.tensor_io import StoredTensor
from pipeline.engine.task import JobContext, JobOutput


@dataclass(frozen=True)
class HangsOnce:
    """Parts whose first iteration takes an hour.

    Attributes:
        parts: the parts.
        mark: path of a file that the first iteration creates.
    """

    parts: tuple[StoredTensor, ...]
    mark: str

    def __iter__(self) -> Iterator[StoredTensor]:
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            time.sleep(3600)
        return iter(self.parts)


@dataclass(frozen=True)
class PassOn:
    """A job that returns its inputs as payloads without reading them."""

    def run(self, context: JobContext) -> JobOutput[None]:
        return JobOutput(None, context.inputs)
