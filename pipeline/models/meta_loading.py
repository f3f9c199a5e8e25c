"""Loading the class and config of a model on torch's meta device, with the model's own code if it is trusted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.checkpoints.meta_model import MetaModel, auto_class
from pipeline.checkpoints.sources.small_files import require_no_custom_code, small_files
from pipeline.device import requires_new_process
from pipeline.errors import CheckpointError, SwscError, first_line


def load_meta_model(location: str, trusted: bool) -> MetaModel:
    """Load the causal LM at `location` on the meta device.

    Args:
        location: directory or object store of the model.
        trusted: code that the model brings may be run.

    Raises:
        Exception: anything that transformers or the model's code may raise; `loading_errors` converts it to
            CheckpointError.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = small_files(location)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trusted)
    # transformers reads the generation config only when it loads from a directory.
    if Path(folder, "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return MetaModel(model, config if isinstance(config, type(model.config)) else config.get_text_config())


@contextmanager
def loading_errors(location: str) -> Iterator[None]:
    """Convert errors of transformers, and of code that a model brings, to CheckpointError."""
    try:
        yield
    except SwscError:
        # For example an object store that did not answer, which is tried again.
        raise
    except Exception as error:
        if requires_new_process(error):
            # The GPU is full or broken; the checkpoint is not to blame.
            raise
        require_no_custom_code(location, error)
        raise CheckpointError(f"{location}: transformers cannot load it: {first_line(error)}") from None
