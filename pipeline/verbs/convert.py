"""The verb convert: a GGUF file in, a safetensors checkpoint with dequantized weights out."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.sources.gguf import DEFAULT_DTYPE, convert_gguf
from pipeline.errors import OutputError
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths


@dataclass(frozen=True)
class ConvertRequest:
    """A conversion of the GGUF file `file` into the new local directory `output`, with weights of `dtype`."""

    file: str
    output: str
    dtype: str = DEFAULT_DTYPE

    def require_valid(self) -> None:
        """Raise OutputError if the output is not on this machine, or would change the file."""
        if "://" in self.output:
            raise OutputError(
                f"{self.output}: convert writes local directories only; choose one, and copy it afterwards"
            )
        require_disjoint_paths(UserPath.at("OUTPUT", self.output), user_paths([("FILE", self.file)]))


@dataclass(frozen=True)
class ConvertResult:
    """A converted checkpoint.

    Attributes:
        tensors: GGUF data type -> number of tensors.
        baseline: name of the quantization that the weights were dequantized from; empty if they were not quantized.
    """

    tensors: dict[str, int]
    baseline: str


def convert(request: ConvertRequest) -> ConvertResult:
    """Convert a file; raises CheckpointError for a file that is not GGUF or has data types that cannot be read."""
    request.require_valid()
    note = convert_gguf(Path(request.file), request.output, request.dtype)
    return ConvertResult(dict(note.types), note.baseline)
