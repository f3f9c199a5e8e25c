"""Opens a model at any location. Downloads from the Hub and conversions of GGUF files happen here only."""

from pipeline.checkpoints.checkpoint import Checkpoint, read_checkpoint
from pipeline.checkpoints.sources.gguf import cached_checkpoint, is_gguf
from pipeline.checkpoints.sources.hub import download


def open_checkpoint(location: str) -> Checkpoint:
    """Read headers and config of the model at `location`: a directory, an object store, a Hub id or a GGUF file.

    Raises:
        CheckpointError: there is no checkpoint, or a damaged one; the Hub does not have it; transformers cannot read
            the
            GGUF file.
        OutputError: the disk has no space for the dequantized weights of a GGUF file.
    """
    return read_checkpoint(local_copy(location))


def local_copy(location: str) -> str:
    """Return `location`, or the directory into which a model of the Hub is downloaded or a GGUF file is converted.

    Raises:
        CheckpointError, OutputError: as `open_checkpoint`.
    """
    if is_gguf(location):
        return cached_checkpoint(location)
    return download(location) or location
