"""What a GGUF file would be as a checkpoint, without its weights: names, shapes and config, for a plan.

transformers makes the config of it, and the model on no device; from both follow the headers of the file that `save_pretrained`
would write. A file that was dequantized before is opened as what it was made into.
"""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.architectures.tensor_info import TORCH_TO_SAFETENSORS, TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.sources.gguf import is_cached, is_gguf, warn_dequantized
from pipeline.checkpoints.sources.gguf_reader import (
    INCOMPLETE,
    model_without_weights,
    read_gguf_header,
    saved_tensors,
    silence_transformers,
    translate_errors,
)
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store


def open_headers(location: str) -> Checkpoint:
    """`open_checkpoint` for those who read no weights: a GGUF file is not dequantized for them.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    if not is_gguf(location) or is_cached(location):
        return open_checkpoint(location)
    file = Path(os.path.abspath(location))
    silence_transformers()
    about, weights = read_gguf_header(file)
    model = translate_errors(file, lambda: model_without_weights(file))
    infos = [_info(file.name, name, tensor) for name, tensor in sorted(saved_tensors(model).items())]
    if (wanted := sum(info.count for info in infos)) > weights:
        raise CheckpointError(f"{location}: {weights:,} weights are in it, and {wanted:,} by its header: {INCOMPLETE}")
    tensors = {info.name: info for info in infos}
    warn_dequantized(location, about)
    return Checkpoint(Store.at(str(file.parent)), tensors, _config(model), dequantized=about)


def _info(file: str, name: str, tensor: Any) -> TensorInfo:
    """It lies nowhere yet: at the beginning of the GGUF file, as far as anything reads from there."""
    dtype = TORCH_TO_SAFETENSORS[str(tensor.dtype).removeprefix("torch.")]
    return TensorInfo(name, dtype, tuple(tensor.shape), file, 0, tensor.numel() * tensor.element_size())


def _config(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    return config | {"architectures": [type(model).__name__]}
