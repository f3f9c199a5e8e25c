"""The model at a location on torch's meta device, with the code that it brings if that is trusted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.checkpoints.meta_model import MetaModel, auto_class
from pipeline.checkpoints.sources.small_files import require_no_custom_code, small_files
from pipeline.device import requires_new_process
from pipeline.errors import CheckpointError, SwscError, first_line


def load_meta_model(location: str, trusted: bool) -> MetaModel:
    """The model at `location` as it is measured: a causal LM, with the model's own code if that is trusted.

    Raises:
        Exception: whatever transformers, or code that a model brings, may raise; `loading_errors` makes a CheckpointError of it.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = small_files(location)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trusted)
    if Path(folder, "generation_config.json").exists():  # how the model generates is read from a directory alone
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return MetaModel(model, config if isinstance(config, type(model.config)) else config.get_text_config())


@contextmanager
def loading_errors(location: str) -> Iterator[None]:
    """What transformers says, as a CheckpointError."""
    try:
        yield
    except SwscError:
        raise  # of ours, and said already: a store that does not answer is asked again
    except Exception as error:  # code that a model brings may raise anything
        if requires_new_process(error):
            raise  # a GPU that is full or broken says nothing about the checkpoint
        require_no_custom_code(location, error)
        raise CheckpointError(f"{location}: transformers cannot load it: {first_line(error)}") from None
