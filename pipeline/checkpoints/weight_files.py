"""Finds the files of a model's weights in a directory: exactly those that `from_pretrained` of transformers reads.

The rule is that of `transformers.modeling_utils._get_resolved_checkpoint_files`: the file that `transformers_weights`
of config.json names, else model.safetensors, else the shards of model.safetensors.index.json. Variants
(model.fp16.safetensors), Mistral's consolidated.safetensors, adapters and training states are not read.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.errors import CheckpointError, UserError
from pipeline.storage.store import Store

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of the tensor files of outputs, which `tensor_files` returns.
TENSOR_FILE = re.compile(r"model-\d+-of-\d+\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Bytes of an index or config that is read, at most. Those of an output name every stored tensor of every matrix, and a
# mixture of experts has tens of thousands of matrices.
CONFIG_LIMIT = 1 << 27
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.[\w.-]+")
_SAVE_AGAIN = "`m = AutoModelForCausalLM.from_pretrained(dir{option}); m.save_pretrained(new_dir)`"
ADAPTER_REASON = "an adapter, which is not applied; merge it into the model to include it"


class IgnoredFile(NamedTuple):
    """A file that is not part of the model, and the reason."""

    name: str
    reason: str


class WeightFiles(NamedTuple):
    """The files of a model's weights.

    Attributes:
        files: names of the files, sorted.
        weight_map: tensor -> file, from the index; empty without an index.
        ignored: files of other weights.
    """

    files: list[str]
    weight_map: dict[str, str]
    ignored: tuple[IgnoredFile, ...]


def tensor_files(total: int) -> list[str]:
    """Return the names of the `total` tensor files of an output, in the order of their numbers."""
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def is_adapter(name: str) -> bool:
    """Whether a file is part of a PEFT adapter."""
    return _ADAPTER.fullmatch(name) is not None


def weight_files(store: Store, names: Sequence[str], explicit: object = None) -> WeightFiles:
    """Find the model's weights among the file `names` of a directory.

    Args:
        explicit: `transformers_weights` of config.json, which names the file or the index to read.

    Raises:
        CheckpointError: no safetensors checkpoint under a name that transformers reads, an invalid index, a missing
            shard.
    """
    main_file = _main_file(store, names, explicit)
    is_index = main_file.endswith(".index.json")
    files, weight_map = _read_index(store, main_file) if is_index else ([main_file], {})
    return WeightFiles(files, weight_map, tuple(_ignored(names, {main_file, *files}, main_file)))


def _main_file(store: Store, names: Sequence[str], explicit: object) -> str:
    """Return the name of the single file, or of the index of the shards."""
    if explicit is not None:
        endings = (".safetensors", ".safetensors.index.json")
        if isinstance(explicit, str) and explicit in names and explicit.endswith(endings):
            return explicit
        raise CheckpointError(
            f"{store.root}/config.json: transformers_weights {explicit!r} names no safetensors file of the directory;"
            " repair it"
        )
    if name := next((name for name in (SINGLE, INDEX) if name in names), None):
        return name
    raise CheckpointError(f"{store.root}: {_why_no_weights(store, names)}")


def _why_no_weights(store: Store, names: Sequence[str]) -> str:
    """Return the reason why a directory holds no model, with a remedy."""
    if "adapter_config.json" in names:
        return (
            f"only an adapter{_base_model(store)}; give the model itself, or merge the adapter into it (PEFT's"
            " merge_and_unload)"
        )
    weights = [name for name in names if name.endswith(".safetensors") and not is_adapter(name)]
    matches = (re.fullmatch(r"model\.([\w-]+)(-\d+-of-\d+)?\.safetensors", name) for name in weights)
    variant = next(filter(None, matches), None)
    if variant and "-of-" not in variant[1]:
        option = f', variant="{variant[1]}"'
        return (
            f"{variant[0]} is a variant of the model; save it under the standard name:"
            f" {_SAVE_AGAIN.format(option=option)}"
        )
    if len(weights) == 1:
        return f"{weights[0]} is not the name of a model's file; if it holds the model, rename it to {SINGLE}"
    if weights:
        return (
            f"{len(weights)} safetensors files ({weights[0]} first), but neither {SINGLE} nor {INDEX}; download or"
            " write the index"
        )
    if any(name.endswith(PICKLES) for name in names):
        return (
            "a pickle checkpoint, which can run code when it is opened, is refused; convert it by"
            f" {_SAVE_AGAIN.format(option='')} on a machine that trusts it"
        )
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"only GGUF files; give the name of one of them: {store.root}/{gguf}"
    return "no *.safetensors file; give the directory of a safetensors checkpoint"


def _base_model(store: Store) -> str:
    """Return " (of MODEL)" from the config of an adapter; "" if it does not name its base model."""
    try:
        base = store.read_json("adapter_config.json", CONFIG_LIMIT)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        return ""
    return f" (of {json.dumps(base)})" if isinstance(base, str) else ""


def _read_index(store: Store, index: str) -> tuple[list[str], dict[str, str]]:
    """Return the shards that an index names, all of which exist, and its map of tensors to shards."""
    try:
        weight_map = store.read_json(index, CONFIG_LIMIT)["weight_map"]
        files = sorted(set(weight_map.values()))
        if not all(isinstance(file, str) for file in files):
            raise TypeError("a file name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{store.root}/{index}: not an index ({error}); download it again") from None
    for file in files:
        try:
            present = store.exists(file)
        except UserError as error:
            raise CheckpointError(str(error)) from None
        if not present:
            raise CheckpointError(f"{store.root}: shard {file} is missing, but the index names it; download it again")
    return files, weight_map


def _ignored(names: Sequence[str], read: set[str], main_file: str) -> Iterator[IgnoredFile]:
    """Yield the files of weights and adapters that are not read."""
    for name in names:
        if is_adapter(name):
            yield IgnoredFile(name, ADAPTER_REASON)
        elif name not in read and (name.endswith(".safetensors") or name == INDEX):
            yield IgnoredFile(name, f"not the model's weights, which are read from {main_file}")
