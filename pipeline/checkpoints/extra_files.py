"""Which files beside the weights belong to a model: they are copied with it; every other one is named with a reason.

A tokenizer may have a folder of chat templates, a processor folders of its own, and code whole packages; beside them lie copies of
the weights for other frameworks, states of a training and adapters. A folder is looked into as far as bounds allow.
"""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pipeline.checkpoints.weight_files import INDEX, PICKLES, IgnoredFile, is_adapter
from pipeline.errors import CheckpointError
from pipeline.storage.local_files import TEMPORARY_SUFFIX
from pipeline.storage.paths import links_outside
from pipeline.storage.store import Store, is_inside

_FOREIGN = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".nemo", ".mlmodel", ".npz")
# Kinds of files that tokenizers, templates, processors, code and licences are made of. Of a folder, and of a model on the
# Hub, these alone are taken; of the files directly in a directory all are that are not known to be something else.
_SUFFIXES = (
    ".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".py", ".pyi", ".toml", ".yaml", ".yml", ".tsv", ".vocab",
    ".merges", ".bpe", ".tiktoken", ".spm",
)  # fmt: skip
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "AUTHORS")
HUB_PATTERNS = (
    "*.safetensors",
    *(f"*{suffix}" for suffix in _SUFFIXES),
    "*.model.v*",
    *(f"{name}*" for name in _TERMS),
)
# folder -> what it holds
_FOLDERS = {
    "onnx": "weights for another framework", "openvino": "weights for another framework",
    "coreml": "weights for another framework", "tflite": "weights for another framework",
    "gguf": "weights for another framework", "original": "the original release's own files, which transformers does not read",
    "metal": "weights for another framework", "runs": "logs of a training", "wandb": "logs of a training",
    "logs": "logs of a training", "__pycache__": "compiled code", "lost+found": "the file system's own",
}  # fmt: skip
CACHED_SIZES = ".swsc-kept.json"  # in a checkpoint that gguf.py keeps: name -> bytes of each of its files
LFS_POINTER = b"version https://git-lfs"
ADAPTER_FOLDER = "swsc_adapter"  # folder of the LoRA adapter that `swsc restore --adapter` writes beside a dense model
HUB_IGNORED_PATTERNS = tuple(f"{folder}/*" for folder in _FOLDERS)  # of a model on the Hub
_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack|pth?)\.index(\.\w+)?\.json$")
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states)[^/]*$")
_STEP = re.compile(r"(checkpoint|global_step|epoch|step)[-_]?\d+$")
_MODULES, _LONGEST = "modules.json", 1 << 20  # of sentence-transformers; bytes that are read of it
_DEPTH, _FILES = 6, 1000  # most folders inside each other, and most files of one folder: real ones have 2 and dozens


@dataclass(frozen=True)
class ExtraFiles:
    """Files beside weights and config: names of those that are copied, sorted, and what is left out."""

    copied: tuple[str, ...] = ()
    left_out: tuple[IgnoredFile, ...] = ()


def require_link_inside(store: Store, name: str) -> None:
    """Raise CheckpointError for what cannot be read, and for a link out of the directory, whose target would be copied as the model's."""
    require_readable(store, name)
    if links_outside(store, name):
        target = os.path.realpath(f"{store.root}/{name}")
        raise CheckpointError(
            f"{store.root}: {name} is a link to {target}, outside the directory; put what it leads to there itself, or, of a"
            " file, a hard link"
        )


def require_readable(store: Store, name: str) -> None:
    """Raise CheckpointError for a link that leads nowhere, or a file that may not be read: it would show when it is copied, last of all."""
    path = f"{store.root}/{name}"
    if not store.is_local:
        return
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(
            f"{store.root}: {name} is a link to {os.path.realpath(path)}, where nothing is; get the file again, or remove the link"
        )
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                require_no_lfs_pointer(path, file.read(len(LFS_POINTER)))
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read by this user; change its rights, or move it away") from None


def require_no_lfs_pointer(where: str, beginning: bytes) -> None:
    """Raise CheckpointError for what a clone without git-lfs has in place of a file."""
    if beginning == LFS_POINTER:
        raise CheckpointError(
            f"{where}: a pointer of git-lfs, not the file itself; run `git lfs pull` in its repository"
        )


def find_extra_files(store: Store, weights: Collection[str]) -> ExtraFiles:
    """Decide for everything in a directory but config.json, index and the files `weights`, which are decided on already.

    Names alone are looked at, and what `modules.json` of sentence-transformers says.

    Raises:
        CheckpointError: a link to a file or a folder outside the directory.
    """
    copied: list[str] = []
    left: list[IgnoredFile] = []
    entries = store.entries()
    modules = _modules(store) if _MODULES in entries else frozenset()
    for name, is_file in sorted(entries.items()):
        if name in weights or name in ("config.json", INDEX, CACHED_SIZES):
            continue
        reason = _reason(name) if is_file else _reason_of_folder(name)
        found = ExtraFiles((name,)) if is_file and not reason else ExtraFiles()
        if not reason:
            require_link_inside(store, name)
        if not is_file and not reason:
            seen = {os.path.realpath(store.root)} if store.is_local else set()
            found = _below(store, name, weights, seen, name in modules)
        copied += found.copied
        left += [IgnoredFile(name if is_file else f"{name}/", reason)] if reason else found.left_out
    return ExtraFiles(tuple(sorted(copied)), tuple(sorted(left, key=lambda one: one.name)))


def _modules(store: Store) -> frozenset[str]:
    """Folders that `modules.json` names as layers after the model: poolings, and dense layers, whose weights are theirs alone."""
    try:
        named = {str(one["path"]) for one in store.read_json(_MODULES, _LONGEST)}
        files = {folder: f"{folder}/config.json" for folder in named if folder and is_inside(folder)}
        return frozenset(
            folder
            for folder, config in files.items()
            if not (store.exists(config) and "model_type" in store.read_json(config, _LONGEST))
        )
    except (ValueError, KeyError, TypeError):
        return frozenset()


def _below(store: Store, folder: str, weights: Collection[str], seen: set[str], is_module: bool) -> ExtraFiles:
    """The files in a folder and in those below it; a folder of too many files, or one with weights, is left out whole.

    Args:
        seen: real paths of folders that are not looked into: those that lead back to the model itself.
        is_module: weights in it are those of a layer that comes after the model.
    """
    copied: list[str] = []
    left: list[IgnoredFile] = []
    for number, (name, reason) in enumerate(_walk(store, folder, seen, is_module)):
        if number == _FILES:
            return ExtraFiles((), (IgnoredFile(f"{folder}/", f"more than {_FILES:,} files, no part of a model"),))
        if name in weights:
            continue
        if reason and not (is_module and name.endswith(".safetensors") and not is_adapter(os.path.basename(name))):
            left.append(IgnoredFile(name, reason))
        else:
            copied.append(name)
    return ExtraFiles(tuple(copied), tuple(left))


def _walk(store: Store, folder: str, seen: set[str], is_module: bool = False) -> Iterator[tuple[str, str]]:
    """Name of every file in a folder -> why it is left out; "": it is copied. A linked folder is looked into once."""
    real = os.path.realpath(f"{store.root}/{folder}") if store.is_local else folder
    if real in seen:
        return
    seen.add(real)
    entries = store.below(folder).entries()
    if not is_module and "config.json" in entries and any(is_weights(name) for name in entries):
        yield f"{folder}/", "another model, with weights of its own"
        return
    for name, is_file in sorted(entries.items()):
        inner = f"{folder}/{name}"
        reason = _reason(name) or _reason_of_kind(name) if is_file else _reason_of_folder(name)
        if not reason and not is_file and inner.count("/") >= _DEPTH:
            reason = f"more than {_DEPTH} folders inside each other"
        if not reason:
            require_link_inside(store, inner)
        if is_file or reason:
            yield inner if is_file else f"{inner}/", reason
        else:
            yield from _walk(store, inner, seen)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, for whatever framework."""
    return name.lower().endswith((".safetensors", *PICKLES, *_FOREIGN))


def _reason_of_prefix(name: str) -> str:
    if name.startswith("."):
        return "hidden: a tool's own"
    if name == ADAPTER_FOLDER:
        return "the low-rank part of a model that was restored with --adapter, which is not applied; restore it without"
    return "of an earlier output: written anew" if name.startswith("swsc_") else ""


def _reason(name: str) -> str:
    """Why a file is known to be no part of the model beside its weights; "" if it is not."""
    lower = name.lower()
    if reason := _reason_of_prefix(name):
        return reason
    if lower.endswith(TEMPORARY_SUFFIX):
        return "unfinished"
    if is_adapter(name):
        return "an adapter, which is not applied; merge it into the model to have it in"
    if lower.endswith(PICKLES):
        training = _TRAINING.match(lower)
        return "state of a training" if training else "pickled weights, which are never opened"
    if lower.endswith(_FOREIGN):
        return "weights for another framework"
    if lower.endswith(".safetensors"):
        return "weights that are not the model's"
    return "index of weights that are not the model's" if _INDEX.search(lower) else ""


def _reason_of_folder(name: str) -> str:
    lower = name.lower()
    if reason := _reason_of_prefix(name):
        return reason
    if _STEP.match(lower):
        return "state of a training"
    return _FOLDERS.get(lower, "")


def _reason_of_kind(name: str) -> str:
    """Why a file of a folder is not of a kind that belongs to a model; "" if it is."""
    known = name.lower().endswith(_SUFFIXES) or name.upper().startswith(_TERMS) or ".model.v" in name
    return "" if known else "of a kind that tokenizers, templates, processors and code do not consist of"
