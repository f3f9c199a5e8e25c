"""Builds the model of a config.json on the meta device: its class, parameters and ties, without weights."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.architectures.families import Family
from pipeline.architectures.model_config import ModelConfig
from pipeline.errors import CheckpointError, first_line

# Characters of an error of transformers that are shown.
_MESSAGE_CHARACTERS = 300


class MetaModel(NamedTuple):
    """A model on the meta device, and its config: the whole one, or that of the text part for a text model."""

    model: Any
    config: Any


class UnknownModel(Exception):
    """transformers has no code for the model, or the code needs a missing package: its parameters are unknown."""


def meta_models_of(config: ModelConfig, location: str, tensors: int) -> list[MetaModel]:
    """Build the models that a config describes: of the class that it names, and of the class that predicts tokens.

    Only classes of transformers are built, never code of the checkpoint.

    Args:
        location: location of the checkpoint, for messages.
        tensors: number of stored tensors. A model with more layers is not built, since that might take forever.

    Raises:
        UnknownModel: transformers has no code for the model.
        CheckpointError: the values of the config do not describe a model.
    """
    layers = Family(config).layers
    if layers is not None and layers > tensors:
        raise CheckpointError(
            f"{location}: config.json describes {layers} layers, but the files hold only {tensors} tensors; repair"
            " config.json"
        )
    dense_config = {key: value for key, value in config.items() if key != "quantization_config"}
    return _meta_models_of(json.dumps(dense_config, sort_keys=True), location)


@lru_cache(maxsize=4)
def _meta_models_of(text: str, location: str) -> list[MetaModel]:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = json.loads(text).get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnknownModel(f"transformers has no code for model_type {model_type!r}")
    with tempfile.TemporaryDirectory(prefix="swsc-") as folder:
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                return [_empty(kind, config) for kind in _classes(json.loads(text), config)]
        except ImportError as error:
            raise UnknownModel(first_line(error)) from None
        except Exception as error:  # each class validates its config in its own way
            raise CheckpointError(
                f"{location}/config.json: describes no valid {model_type} model ({_one_line(error)}); {_remedy(error)}"
            ) from None


def _remedy(error: Exception) -> str:
    """Return the remedy for an invalid config.

    transformers looks up its dtype, such as "auto", as an attribute of torch.
    """
    if isinstance(error, AttributeError) and "module 'torch'" in str(error):
        return "set the dtype of the weights there, for example bfloat16"
    return "repair it"


def stored_ties(names: Iterable[str], config: ModelConfig, location: str) -> list[tuple[str, str]]:
    """Return the tied pairs of the model's class, by names in checkpoints: (name, name of the shared tensor).

    The second one is stored, if one of them is: transformers ties in both directions.

    Raises:
        UnknownModel, CheckpointError: as `meta_models_of`.
    """
    from swsc_core.hf.weight_names import WeightNames, saved_name

    stored = dict.fromkeys(names)
    model = meta_models_of(config, location, len(stored))[0].model
    pairs: Mapping[str, str] = model.all_tied_weights_keys
    if not pairs:
        return []
    targets = WeightNames(model)
    by_parameter = {targets.target(name)[0]: name for name in stored}

    def name_of(parameter: str) -> str:
        return by_parameter.get(parameter) or saved_name(model, parameter)

    ties = [(name_of(parameter), name_of(shared)) for parameter, shared in pairs.items()]
    return [(name, shared) if shared in stored else (shared, name) for name, shared in ties]


def _classes(model_config: ModelConfig, config: Any) -> list[Any]:
    """Return the class of transformers that config.json names, then the class that predicts tokens, if it differs."""
    named = _named_classes(model_config)
    mapping = auto_class(config)._model_mapping
    if type(config) not in mapping:
        if not named:
            raise UnknownModel(f"{type(config).__name__} has no model that predicts tokens")
        return named[:1]
    token_predictor = mapping[type(config)]
    return [*named[:1], *([token_predictor] if token_predictor not in named[:1] else [])]


def related_weight_names(config: Any) -> set[str]:
    """Return the weight names of a family's classes without a head and for pretraining, such as the pooler of BERT."""
    from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING

    related: set[str] = set()
    for mapping in (MODEL_MAPPING, MODEL_FOR_PRETRAINING_MAPPING):
        kinds: Any = mapping.get(type(config), ())
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            try:
                names = _empty(kind, config).model.state_dict()
            except Exception:  # a class that cannot be built, because a package is missing, adds no names
                continue
            related |= {*names, *(f"{kind.base_model_prefix}.{name}" for name in names)}
    return related


def class_is_named(config: ModelConfig) -> bool:
    """Whether config.json names the files' class of transformers. If not, the files may have another head, or none."""
    return bool(_named_classes(config))


def _named_classes(config: ModelConfig) -> list[Any]:
    import transformers

    names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    kinds = [getattr(transformers, name, None) for name in names]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]


def _empty(kind: Any, config: Any) -> MetaModel:
    """Build a model of class `kind`.

    The class of a text model gets the text part of the config, as in the Auto classes.
    """
    text = None if isinstance(config, kind.config_class) else config.get_text_config()
    class_config = text if isinstance(text, kind.config_class) else config
    with torch.device("meta"):
        return MetaModel(kind._from_config(class_config), class_config)


def auto_class(config: Any) -> Any:
    """Return the Auto class that loads a model that predicts tokens: that of images too, if the family has no other."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    only_with_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable progress bars and log messages of transformers. Errors are reported by exceptions."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    """Return a whole message in one line: what is wrong with a config is in the lines after the first."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS] or type(error).__name__
