"""Decides which files beside the weights are copied with a model. Every other file is reported with a reason.

A tokenizer may have a folder of chat templates, a processor has folders of its own, and code may be whole packages. The
same directory often holds the weights for other frameworks, training states and adapters. Folders are searched up to
fixed bounds.
"""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pipeline.checkpoints.weight_files import ADAPTER_REASON, INDEX, PICKLES, IgnoredFile, is_adapter
from pipeline.errors import CheckpointError
from pipeline.storage.local_files import TEMPORARY_SUFFIX
from pipeline.storage.paths import links_outside
from pipeline.storage.store import Store, is_inside

# Endings of weights for other frameworks.
_FOREIGN = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".nemo", ".mlmodel", ".npz")
# Endings of the files of tokenizers, templates, processors, code and licences. From folders, and from a model on the
# Hub, only these are taken. Of the files directly in the directory all are taken that are not known to be something
# else.
_SUFFIXES = (
    ".json",
    ".jsonl",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".py",
    ".pyi",
    ".toml",
    ".yaml",
    ".yml",
    ".tsv",
    ".vocab",
    ".merges",
    ".bpe",
    ".tiktoken",
    ".spm",
)
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "AUTHORS")
HUB_PATTERNS = (
    "*.safetensors",
    *(f"*{suffix}" for suffix in _SUFFIXES),
    "*.model.v*",
    *(f"{name}*" for name in _TERMS),
)
# Folder that is ignored -> what it contains.
_FOLDERS = {
    "onnx": "weights for another framework",
    "openvino": "weights for another framework",
    "coreml": "weights for another framework",
    "tflite": "weights for another framework",
    "gguf": "weights for another framework",
    "metal": "weights for another framework",
    "original": "files of the original release, which transformers does not read",
    "runs": "logs of a training run",
    "wandb": "logs of a training run",
    "logs": "logs of a training run",
    "__pycache__": "compiled code",
    "lost+found": "a folder of the file system",
}
# File in a checkpoint that `sources/gguf.py` caches: name -> bytes of each of its files.
CACHED_SIZES = ".swsc-kept.json"
# First bytes of a pointer file of git-lfs.
LFS_POINTER = b"version https://git-lfs"
# Folder of the LoRA adapter that `swsc restore --adapter` writes beside a dense model.
ADAPTER_FOLDER = "swsc_adapter"
# Patterns of files that are not downloaded from the Hub.
HUB_IGNORED_PATTERNS = tuple(f"{folder}/*" for folder in _FOLDERS)
_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack|pth?)\.index(\.\w+)?\.json$")
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states)[^/]*$")
_STEP = re.compile(r"(checkpoint|global_step|epoch|step)[-_]?\d+$")
# File of sentence-transformers that lists its modules, and bytes of it that are read at most.
_MODULES, _MODULES_LIMIT = "modules.json", 1 << 20
# Largest depth of folders, and number of files of one folder. Real models have 2 and dozens.
_MAX_DEPTH, _MAX_FILES = 6, 1000


@dataclass(frozen=True)
class ExtraFiles:
    """Files beside weights and config: sorted names of those that are copied, and the ignored ones."""

    copied: tuple[str, ...] = ()
    ignored: tuple[IgnoredFile, ...] = ()


def require_link_inside(store: Store, name: str) -> None:
    """Raise CheckpointError for an unreadable file, and for a link whose target is outside the directory."""
    require_readable(store, name)
    if links_outside(store, name):
        target = os.path.realpath(f"{store.root}/{name}")
        raise CheckpointError(
            f"{store.root}: {name} is a link to {target}, outside the directory; replace it by a copy, or a file by a"
            " hard link"
        )


def require_readable(store: Store, name: str) -> None:
    """Raise CheckpointError for a broken link, a file without read permission, or a pointer of git-lfs."""
    path = f"{store.root}/{name}"
    if not store.is_local:
        return
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(
            f"{store.root}: {name} is a broken link to {os.path.realpath(path)}; download the file again, or remove"
            " the link"
        )
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                require_no_lfs_pointer(path, file.read(len(LFS_POINTER)))
    except PermissionError:
        raise CheckpointError(f"{path}: permission denied; make the file readable, or remove it") from None


def require_no_lfs_pointer(path: str, first_bytes: bytes) -> None:
    """Raise CheckpointError if the first bytes are those of a git-lfs pointer, which a clone without git-lfs has."""
    if first_bytes == LFS_POINTER:
        raise CheckpointError(
            f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull` in its repository"
        )


def find_extra_files(store: Store, weights: Collection[str]) -> ExtraFiles:
    """Decide for every file of a directory except config.json, the index and the files `weights`.

    Decisions depend on names, and on `modules.json` of sentence-transformers.

    Raises:
        CheckpointError: a file or folder that would be copied is a link that leads out of the directory.
    """
    copied: list[str] = []
    ignored: list[IgnoredFile] = []
    entries = store.entries()
    modules = _modules(store) if _MODULES in entries else frozenset()
    for name, is_file in sorted(entries.items()):
        if name in weights or name in ("config.json", INDEX, CACHED_SIZES):
            continue
        if reason := _file_reason(name) if is_file else _folder_reason(name):
            ignored.append(IgnoredFile(name if is_file else f"{name}/", reason))
            continue
        require_link_inside(store, name)
        if is_file:
            copied.append(name)
        else:
            visited = {os.path.realpath(store.root)} if store.is_local else set()
            contents = _find_in_folder(store, name, weights, visited, name in modules)
            copied += contents.copied
            ignored += contents.ignored
    return ExtraFiles(tuple(sorted(copied)), tuple(sorted(ignored, key=lambda file: file.name)))


def _modules(store: Store) -> frozenset[str]:
    """Return the folders of layers after the model that `modules.json` names: pooling and dense layers with weights."""
    try:
        folders = {str(module["path"]) for module in store.read_json(_MODULES, _MODULES_LIMIT)}
        configs = {folder: f"{folder}/config.json" for folder in folders if folder and is_inside(folder)}
        return frozenset(folder for folder, config in configs.items() if not _is_model_config(store, config))
    except (ValueError, KeyError, TypeError):
        return frozenset()


def _is_model_config(store: Store, name: str) -> bool:
    return store.exists(name) and "model_type" in store.read_json(name, _MODULES_LIMIT)


def _find_in_folder(
    store: Store, folder: str, weights: Collection[str], visited: set[str], is_module: bool
) -> ExtraFiles:
    """Decide for the files in a folder and in its folders. A folder with too many files is ignored as a whole.

    Args:
        visited: real paths of folders that are not searched again: a link may lead back to the model itself.
        is_module: the folder is a layer after the model, whose weights are copied.
    """
    copied: list[str] = []
    ignored: list[IgnoredFile] = []
    for number, (name, reason) in enumerate(_walk(store, folder, visited, is_module)):
        if number == _MAX_FILES:
            return ExtraFiles((), (IgnoredFile(f"{folder}/", f"more than {_MAX_FILES:,} files, not part of a model"),))
        if name in weights:
            continue
        is_module_weight = is_module and name.endswith(".safetensors") and not is_adapter(os.path.basename(name))
        if reason and not is_module_weight:
            ignored.append(IgnoredFile(name, reason))
        else:
            copied.append(name)
    return ExtraFiles(tuple(copied), tuple(ignored))


def _walk(store: Store, folder: str, visited: set[str], is_module: bool = False) -> Iterator[tuple[str, str | None]]:
    """Yield the name of every file below a folder with the reason to ignore it; None: it is copied.

    An ignored folder is yielded by its own name. A folder that links lead to several times is searched once.
    """
    real_path = os.path.realpath(f"{store.root}/{folder}") if store.is_local else folder
    if real_path in visited:
        return
    visited.add(real_path)
    entries = store.below(folder).entries()
    if not is_module and "config.json" in entries and any(is_weights(name) for name in entries):
        yield f"{folder}/", "another model, with weights of its own"
        return
    for name, is_file in sorted(entries.items()):
        path = f"{folder}/{name}"
        reason = _file_reason(name) or _kind_reason(name) if is_file else _folder_reason(name)
        if not reason and not is_file and path.count("/") >= _MAX_DEPTH:
            reason = f"more than {_MAX_DEPTH} folders inside each other"
        if not reason:
            require_link_inside(store, path)
        if is_file or reason:
            yield path if is_file else f"{path}/", reason
        else:
            yield from _walk(store, path, visited)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, for any framework."""
    return name.lower().endswith((".safetensors", *PICKLES, *_FOREIGN))


def _prefix_reason(name: str) -> str | None:
    """Return the reason to ignore a file or folder because of the beginning of its name; None if there is none."""
    if name.startswith("."):
        return "hidden, and belongs to a tool"
    if name == ADAPTER_FOLDER:
        return (
            "the adapter of a model that was restored with --adapter, which is not applied; restore it without the flag"
        )
    return "written by an earlier run; replaced" if name.startswith("swsc_") else None


def _file_reason(name: str) -> str | None:
    """Return the reason why a file is not copied; None if nothing is known against it."""
    lower = name.lower()
    if reason := _prefix_reason(name):
        return reason
    if lower.endswith(TEMPORARY_SUFFIX):
        return "incomplete"
    if is_adapter(name):
        return ADAPTER_REASON
    if lower.endswith(PICKLES):
        training = _TRAINING.match(lower)
        return "state of a training run" if training else "pickled weights, which are never opened"
    if lower.endswith(_FOREIGN):
        return "weights for another framework"
    if lower.endswith(".safetensors"):
        return "weights that are not the model's"
    return "index of weights that are not the model's" if _INDEX.search(lower) else None


def _folder_reason(name: str) -> str | None:
    """Return the reason why a folder is not searched; None if it is."""
    lower = name.lower()
    if reason := _prefix_reason(name):
        return reason
    if _STEP.match(lower):
        return "state of a training run"
    return _FOLDERS.get(lower)


def _kind_reason(name: str) -> str | None:
    """Return the reason to ignore a file of a folder by its ending; None if such files belong to models."""
    is_extra = name.lower().endswith(_SUFFIXES) or name.upper().startswith(_TERMS) or ".model.v" in name
    return None if is_extra else "not a file type of tokenizers, templates, processors or code"
