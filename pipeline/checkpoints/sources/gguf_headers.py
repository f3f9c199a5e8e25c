"""Headers of a GGUF file as a checkpoint, for plans: names, shapes and config, without dequantizing the weights.

transformers builds config and model on the meta device, which give the headers of the file that `save_pretrained` would
write. A file that was converted before is opened as the converted checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.architectures.model_config import ModelConfig
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
    """Open a checkpoint like `open_checkpoint`, for readers of headers only: a GGUF file is not dequantized.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    if not is_gguf(location) or is_cached(location):
        return open_checkpoint(location)
    file = Path(os.path.abspath(location))
    silence_transformers()
    origin, weights = read_gguf_header(file)
    model = translate_errors(file, lambda: model_without_weights(file))
    infos = [_info(file.name, name, tensor) for name, tensor in sorted(saved_tensors(model).items())]
    if (expected := sum(info.count for info in infos)) > weights:
        raise CheckpointError(f"{location}: {weights:,} weights, but {expected:,} by the header: {INCOMPLETE}")
    tensors = {info.name: info for info in infos}
    warn_dequantized(location, origin)
    return Checkpoint(Store.at(str(file.parent)), tensors, _config(model), dequantized=origin)


def _info(file: str, name: str, tensor: Any) -> TensorInfo:
    """Describe a tensor whose bytes are not stored yet: its offset is 0."""
    dtype = TORCH_TO_SAFETENSORS[str(tensor.dtype).removeprefix("torch.")]
    return TensorInfo(name, dtype, tuple(tensor.shape), file, 0, tensor.numel() * tensor.element_size())


def _config(model: Any) -> ModelConfig:
    config: ModelConfig = json.loads(model.config.to_json_string())
    return {**config, "architectures": [type(model).__name__]}
