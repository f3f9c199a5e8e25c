"""Which files of a directory hold the model's weights: those that `from_pretrained` of transformers would read, and no others.

The rule is that of `transformers.modeling_utils._get_resolved_checkpoint_files`: the file that config.json's `transformers_weights`
names, else model.safetensors, else the shards of model.safetensors.index.json. Variants (model.fp16.safetensors), Mistral's
consolidated.safetensors, adapters and the state of a training run are not the model.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import CheckpointError, UserError
from pipeline.storage.store import Store

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of the files of tensors that outputs have, as `tensor_files` gives them.
TENSOR_FILE = re.compile(r"model-\d+-of-\d+\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Bytes that are read of an index or config: more than any real one has. Those of an output name every part of every matrix, of
# which a mixture of experts has tens of thousands.
JSON_LIMIT = 1 << 27
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.[\w.-]+")
_SAVE_AGAIN = "`m = AutoModelForCausalLM.from_pretrained(dir{how}); m.save_pretrained(new_dir)`"


class IgnoredFile(NamedTuple):
    """A file that is not part of the model, and why."""

    name: str
    reason: str


class WeightFiles(NamedTuple):
    """Files that hold the weights, in order; the index's map of tensors to files (empty without one); what is left out."""

    files: list[str]
    weight_map: dict[str, str]
    passed_over: tuple[IgnoredFile, ...]


def tensor_files(total: int) -> list[str]:
    """Names of the `total` files of tensors of an output, in the order in which they are numbered."""
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def is_adapter(name: str) -> bool:
    """Whether a file is part of a PEFT adapter that lies beside the model, or instead of it."""
    return _ADAPTER.fullmatch(name) is not None


def weight_files(store: Store, names: Sequence[str], explicit: object = None) -> WeightFiles:
    """The model's files among `names`.

    Args:
        explicit: `transformers_weights` of config.json, which names the file or the index to be read.

    Raises:
        CheckpointError: no safetensors checkpoint under a name that transformers reads, an index that is none, a missing shard.
    """
    first = _chosen(store, names, explicit)
    files, weight_map = _shards_of(store, first) if first.endswith(".index.json") else ([first], {})
    return WeightFiles(files, weight_map, tuple(_passed_over(names, {first, *files}, first)))


def _chosen(store: Store, names: Sequence[str], explicit: object) -> str:
    """The file or the index that is read."""
    if explicit is not None:
        if (
            isinstance(explicit, str)
            and explicit in names
            and explicit.endswith((".safetensors", ".safetensors.index.json"))
        ):
            return explicit
        raise CheckpointError(
            f"{store.root}/config.json: transformers_weights {explicit!r} names no safetensors file of the directory; repair it"
        )
    if found := next((name for name in (SINGLE, INDEX) if name in names), None):
        return found
    raise CheckpointError(f"{store.root}: {_why_none(store, names)}")


def _why_none(store: Store, names: Sequence[str]) -> str:
    """Why a directory holds no model, and what helps."""
    if "adapter_config.json" in names:
        return f"an adapter alone{_base(store)}; give the model itself, or merge the adapter into it (PEFT's merge_and_unload)"
    weights = [name for name in names if name.endswith(".safetensors") and not is_adapter(name)]
    variant = next(
        (found for name in weights if (found := re.fullmatch(r"model\.([\w-]+)(-\d+-of-\d+)?\.safetensors", name))),
        None,
    )
    if variant and "-of-" not in variant[1]:
        how = f', variant="{variant[1]}"'
        return (
            f"{variant[0]} is a variant, which is not read unasked; save it as the model: {_SAVE_AGAIN.format(how=how)}"
        )
    if len(weights) == 1:
        return (
            f"{weights[0]} is not read as the model, whose file is called {SINGLE}; rename it if that is what it holds"
        )
    if weights:
        return f"{len(weights)} safetensors files ({weights[0]} first), but neither {SINGLE} nor {INDEX}; fetch or write the index"
    if any(name.endswith(PICKLES) for name in names):
        return (
            "a pickle checkpoint, which can run code when it is opened, is refused; convert it with"
            f" {_SAVE_AGAIN.format(how='')} on a machine that trusts it"
        )
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"GGUF files only; give one of them by its name: {store.root}/{gguf}"
    return "no *.safetensors file; give the directory of a safetensors checkpoint"


def _base(store: Store) -> str:
    """ " of MODEL", as the adapter's own config says."""
    try:
        base = store.read_json("adapter_config.json", JSON_LIMIT)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        return ""
    return f" (of {json.dumps(base)})" if isinstance(base, str) else ""


def _shards_of(store: Store, index: str) -> tuple[list[str], dict[str, str]]:
    try:
        weight_map = store.read_json(index, JSON_LIMIT)["weight_map"]
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


def _passed_over(names: Sequence[str], read: set[str], first: str) -> list[IgnoredFile]:
    found = []
    for name in names:
        if is_adapter(name):
            found.append(IgnoredFile(name, "an adapter, which is not applied; merge it into the model to have it in"))
        elif name not in read and (name.endswith(".safetensors") or name == INDEX):
            found.append(IgnoredFile(name, f"not the model's weights: those are read from {first}"))
    return found
