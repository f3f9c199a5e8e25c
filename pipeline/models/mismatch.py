"""Explanations of differences between the files of a model and its config.json."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.architectures.families import Family
from pipeline.architectures.tensor_names import tensor_kind
from pipeline.checkpoints.meta_model import MetaModel
from pipeline.models.stored_model import Model

# Words that wrappers insert into the names of parameters -> the wrapper.
_WRAPPERS = {
    "module": "DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model": "PEFT",
    "base_layer": "PEFT",
    "model": "a wrapper",
}
# Words at the beginning of a name that are left out to compare the rest of it with the names of the model.
_MAX_PREFIX_WORDS = 3
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Mismatch:
    """Differences between files and config.json, with the names of parameters that the model's class uses.

    Attributes:
        class_name: name of the class that config.json describes.
        missing: parameters of the class that the files lack.
        unknown: weights of the files that the class does not have.
        shapes: parameters with another shape: name, shape in the files, shape by config.json.
    """

    class_name: str
    missing: list[str]
    unknown: list[str]
    shapes: list[tuple[str, list[int], list[int]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.shapes)


def known_cause(model: Model, mismatch: Mismatch, meta_model: MetaModel) -> str | None:
    """Return the common cause of a mismatch with its remedy; None if no common cause explains it."""
    causes = (
        _wrapper_prefix(mismatch),
        _layer_count(model, mismatch),
        _wrong_shapes(mismatch),
        _missing_head(mismatch, meta_model),
    )
    return next(filter(None, causes), None)


def describe(model: Model, mismatch: Mismatch) -> str:
    """Describe a mismatch without a common cause, with a remedy."""
    parts = []
    if mismatch.missing:
        parts.append(f"lack {len(mismatch.missing)} weights ({first_of(mismatch.missing)})")
    if mismatch.unknown:
        parts.append(f"hold {len(mismatch.unknown)} unknown weights ({first_of(mismatch.unknown)})")
    remedy = "provide all files of the model" if is_incomplete(model, mismatch) else "repair config.json"
    return f"the files {' and '.join(parts)} of the {mismatch.class_name} in config.json; {remedy}"


def is_incomplete(model: Model, mismatch: Mismatch) -> bool:
    """Return whether files are missing: the existing ones hold weights of the same kind in other layers."""
    stored = {_kind(name) for name in model.names}
    return not mismatch.unknown and any(_kind(name) in stored for name in mismatch.missing)


def layer_index(name: str) -> int | None:
    """Return the first number in a tensor's name, which is the index of its layer; None if there is none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def first_of(names: Iterable[str]) -> str:
    """Return the first name, marked as the first if there are more."""
    first, *others = names
    return f"{first} first" if others else first


def _wrapper_prefix(mismatch: Mismatch) -> str | None:
    """A wrapper has inserted words into the names of the model."""
    expected = set(mismatch.missing)
    insertions = Counter(filter(None, (_insertion(name, expected) for name in mismatch.unknown)))
    if 2 * insertions.total() < len(expected) or not insertions:
        return None
    inserted = insertions.most_common(1)[0][0]
    wrapper = next((_WRAPPERS[word] for word in inserted.split(".") if word in _WRAPPERS), "a wrapper")
    remedy = "merge the adapter (merge_and_unload)" if wrapper == "PEFT" else "save the model inside the wrapper"
    return (
        f"the names in the files contain '{inserted}.', which {wrapper} inserts and {mismatch.class_name} does not know"
        f" ({mismatch.unknown[0]} first); {remedy} by its save_pretrained, or remove it from the names"
    )


def _insertion(name: str, expected: set[str]) -> str | None:
    """The words whose removal turns `name` into an expected name; None if there are none."""
    words = name.split(".")
    for count in range(1, len(words)):
        if ".".join(words[count:]) in expected:
            return ".".join(words[:count])
    bare = [word for word in words if word not in _WRAPPERS or word == "model"]
    for count in range(min(_MAX_PREFIX_WORDS, len(bare))):
        if len(bare) < len(words) and ".".join(bare[count:]) in expected:
            return next(word for word in words if word not in bare)
    return None


def _layer_count(model: Model, mismatch: Mismatch) -> str | None:
    """config.json has another number of layers than the files."""
    layers = Family(model.checkpoint.config).layers
    stored = {index for name in model.names if (index := layer_index(name)) is not None}
    if layers is None or not stored:
        return None
    excess = [name for name in mismatch.unknown if (layer_index(name) or 0) >= layers]
    if excess and not mismatch.missing and len(excess) == len(mismatch.unknown):
        return (
            f"config.json has {layers} layers, but the files hold {len(excess)} weights of further layers ({excess[0]}"
            " first); repair config.json"
        )
    absent = [name for name in mismatch.missing if (layer_index(name) or 0) > max(stored)]
    if absent and len(absent) == len(mismatch.missing):
        return (
            f"config.json has {layers} layers, but the files end with layer {max(stored)} ({absent[0]} is"
            " missing); repair config.json, or provide all files of the model"
        )
    return None


def _wrong_shapes(mismatch: Mismatch) -> str | None:
    if not mismatch.shapes:
        return None
    name, stored, expected = mismatch.shapes[0]
    return (
        f"{name} has shape {stored} in the files, but {expected} by config.json ({len(mismatch.shapes)} such weights in"
        " all); repair config.json"
    )


def _missing_head(mismatch: Mismatch, meta_model: MetaModel) -> str | None:
    head = meta_model.model.get_output_embeddings()
    modules = meta_model.model.named_modules()
    names = {f"{path}.weight" for path, module in modules if module is head and head is not None}
    if mismatch.unknown or not mismatch.missing or not names >= {*mismatch.missing}:
        return None
    return (
        f"the files hold no output head ({mismatch.missing[0]}), and by config.json {mismatch.class_name} does not"
        " share it with the embedding; set tie_word_embeddings to true in config.json if it does, or provide files that"
        " hold the head"
    )


def _kind(name: str) -> str:
    """A name without numbers and without its beginning, which transformers may change."""
    return tensor_kind(name).rpartition(".N.")[2]
