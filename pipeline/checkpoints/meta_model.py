"""The model that a config.json describes, on torch's meta device: its class, its parameters and ties, and not a byte of weights."""

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

_MESSAGE = 300  # letters of what transformers says of a config


class MetaModel(NamedTuple):
    """A model without weights, and its config: as it was read, or the part of it that is the text model's if that is what it is."""

    model: Any
    config: Any


class UnknownModel(Exception):
    """transformers has no code for the model, or lacks a package that its code needs: nothing can be said of its parameters."""


def meta_models_of(config: ModelConfig, where: str, tensors: int) -> list[MetaModel]:
    """The models of transformers' own code that a config.json may describe: of the class that it names, and as it is measured.

    Args:
        where: what messages call it.
        tensors: how many of them the files hold; no model of more layers is built, which might take for ever.

    Raises:
        Unknown: transformers has no code for it. CheckpointError: its values make no model.
    """
    layers = Family(config).layers
    if layers is not None and layers > tensors:
        raise CheckpointError(
            f"{where}: config.json says {layers} layers, the files hold {tensors} tensors in all; repair config.json"
        )
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    return _meta_models_of(json.dumps(own, sort_keys=True), where)


@lru_cache(maxsize=4)
def _meta_models_of(text: str, where: str) -> list[MetaModel]:
    from transformers import CONFIG_MAPPING, AutoConfig

    about = json.loads(text)
    if about.get("model_type") not in CONFIG_MAPPING:
        raise UnknownModel(f"transformers has no code for model_type {about.get('model_type')!r}")
    with tempfile.TemporaryDirectory(prefix="swsc-") as folder:
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                return [_empty(kind, config) for kind in _classes(about, config)]
        except ImportError as error:
            raise UnknownModel(first_line(error)) from None
        except Exception as error:  # configs are checked by each class in its own way
            raise CheckpointError(
                f"{where}/config.json: describes no {about['model_type']} model ({_one_line(error)}); {_remedy(error)}"
            ) from None


def _remedy(error: Exception) -> str:
    """What to do about a config: transformers looks its dtype up among the names of torch, "auto" say."""
    if isinstance(error, AttributeError) and "module 'torch'" in str(error):
        return "write the dtype of the weights there, bfloat16 say"
    return "repair it"


def stored_ties(names: Iterable[str], config: ModelConfig, where: str) -> list[tuple[str, str]]:
    """Tied names by the model's class, in the words of checkpoints: one of a pair, and the one that it shares.

    The latter is that which is stored, if one is: transformers ties both ways.

    Raises:
        As `meta_models_of`.
    """
    from swsc_core.hf.weight_names import WeightNames, saved_name

    stored = dict.fromkeys(names)
    model = meta_models_of(config, where, len(stored))[0].model
    pairs: Mapping[str, str] = model.all_tied_weights_keys
    if not pairs:
        return []
    targets = WeightNames(model)
    by_parameter = {targets.target(name)[0]: name for name in stored}

    def name_of(parameter: str) -> str:
        return by_parameter.get(parameter) or saved_name(model, parameter)

    ties = [(name_of(one), name_of(other)) for one, other in pairs.items()]
    return [(one, other) if other in stored else (other, one) for one, other in ties]


def _classes(about: ModelConfig, config: Any) -> list[Any]:
    """The class that config.json names, if transformers has it, then the one that predicts tokens, if that is another."""
    named = _named(about)
    mapping = auto_class(config)._model_mapping
    if type(config) not in mapping:
        if not named:
            raise UnknownModel(f"{type(config).__name__} has no model that predicts tokens")
        return named[:1]
    measured = mapping[type(config)]
    return [*named[:1], *([measured] if measured not in named[:1] else [])]


def related_weight_names(config: Any) -> set[str]:
    """Names of the weights that a family has before a head is chosen, or had while it was trained first: poolers of BERT, say."""
    from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING

    found: set[str] = set()
    for mapping in (MODEL_MAPPING, MODEL_FOR_PRETRAINING_MAPPING):
        kinds: Any = mapping.get(type(config), ())
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            try:
                names = _empty(kind, config).model.state_dict()
            except Exception:  # one that cannot be built, for want of a package say, knows no more names
                continue
            found |= {*names, *(f"{kind.base_model_prefix}.{name}" for name in names)}
    return found


def class_is_named(config: ModelConfig) -> bool:
    """Whether config.json says which class of transformers the files are of; if not, they may hold another head, or none."""
    return bool(_named(config))


def _named(about: ModelConfig) -> list[Any]:
    import transformers

    named = [getattr(transformers, name, None) for name in about.get("architectures") or [] if isinstance(name, str)]
    return [kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]


def _empty(kind: Any, config: Any) -> MetaModel:
    """The config is that of the class but where the class is that of the text model, as in transformers' Auto classes."""
    text = None if isinstance(config, kind.config_class) else config.get_text_config()
    own = text if isinstance(text, kind.config_class) else config
    with torch.device("meta"):
        return MetaModel(kind._from_config(own), own)


def auto_class(config: Any) -> Any:
    """What loads a model that predicts tokens: of some multimodal families only the class that sees pictures, too."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    only_seeing = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only_seeing else AutoModelForCausalLM


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice of transformers: what matters of it is said by us."""
    from transformers.utils import logging

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
    """All that is said; what is wrong with a config stands in the lines after the first."""
    return " ".join(str(error).split())[:_MESSAGE] or type(error).__name__
