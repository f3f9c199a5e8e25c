"""Files that belong to an output: those that its manifest and run records list. No other file is removed."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import NotRequired, TypedDict

from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.checkpoints.weight_files import INDEX, SINGLE, is_adapter
from pipeline.errors import OutputError, UserError
from pipeline.storage.local_files import final_name
from pipeline.storage.store import Store, is_inside
from swsc_core.storage.json_fields import JsonObject

REPORT = "swsc_report.json"
ADAPTER_FILES = (f"{ADAPTER_FOLDER}/adapter_model.safetensors", f"{ADAPTER_FOLDER}/adapter_config.json")
# List of the files beside the tensors that a run is about to write.
FINISHING = ".swsc/finishing.json"
# List of all files that the present run writes, and of those that it replaces.
WRITTEN = ".swsc/files.json"


class ManifestEntry(TypedDict):
    """What a manifest states about one file; `tensors`: sha256 of each tensor in it, by name."""

    size: int
    sha256: str
    tensors: NotRequired[dict[str, str]]


class Manifest(TypedDict):
    """swsc_manifest.json."""

    format_version: int
    identity: JsonObject
    files: dict[str, ManifestEntry]


def read_list(store: Store, name: str) -> list[str]:
    """Read a list of file names that a run wrote; empty if the file is missing.

    Raises:
        OutputError: the file does not hold a list of names.
    """
    try:
        value = store.read_json(name) if store.exists(name) else []
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError("not a list of names")
    except ValueError as error:
        raise OutputError(f"{store.root}: {name} is damaged ({error}); remove it, then run again") from None
    return sorted(_names_inside(value))


def owned(store: Store) -> set[str]:
    """Names of the files that belong to a finished or unfinished output, as far as its lists are readable.

    A file in a subfolder counts only if its bytes are as the manifest lists them: it may belong to somebody else.
    """
    names, files = _recorded(store), _manifest_files(store)
    if files is None:  # The manifest is damaged, but the index lists the tensor files.
        return names | {INDEX, "config.json", *_indexed(store)}
    return names | {name for name, entry in files.items() if "/" not in name or _is_as_listed(store, name, entry)}


def require_no_others(store: Store, names: Iterable[str]) -> None:
    """Raise OutputError if one of the files to be written exists and does not belong to the output."""
    files = _manifest_files(store)
    # Releases before the file list began runs without one.
    has_no_list = store.exists(RUN) and not store.exists(WRITTEN)
    if files is None or has_no_list:
        return
    if others := sorted(present(store, names) - _recorded(store) - files.keys()):
        raise OutputError(
            f"{store.root}: {others[0]} exists and would be replaced, but is not a file of this output; move it, or"
            " choose another directory"
        )


def competing_weights(store: Store, output_files: Collection[str]) -> list[str]:
    """Weight files and adapters at the top level, none of `output_files`, that `from_pretrained` would load."""
    return [name for name in store.names() if (name == SINGLE or is_adapter(name)) and name not in output_files]


def require_no_competing_weights(store: Store) -> None:
    """Raise OutputError for a file of the user that `from_pretrained` would load instead of the output's."""
    files = _manifest_files(store)
    if files is not None and (names := competing_weights(store, files.keys() | _recorded(store))):
        raise OutputError(
            f"{store.root}: {names[0]} is not a file of this output, but from_pretrained would load it instead of the"
            " output's weights, or apply it to them; move it away"
        )


def _recorded(store: Store) -> set[str]:
    """Names of files that the records of a run list."""
    records = {name.removesuffix(".json") for name in _names_below(store, FINISHED_FOLDER)}
    return {*read_list(store, FINISHING), *read_list(store, WRITTEN), *records, REPORT, MANIFEST}


def _manifest_files(store: Store) -> Mapping[str, ManifestEntry] | None:
    """File name -> its entry in the manifest; empty without a manifest, None if the manifest is damaged."""
    try:
        files = dict(store.read_json(MANIFEST)["files"])
        return {name: files[name] for name in _names_inside(files)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        return None


def _is_as_listed(store: Store, name: str, entry: ManifestEntry) -> bool:
    """Whether a file has the bytes that the manifest lists, or is part of an adapter, whose file names are reserved."""
    try:
        return name in ADAPTER_FILES or not file_differences(store, name, entry)
    except (UserError, KeyError, TypeError):
        return False


def clear(store: Store, names: Collection[str]) -> None:
    """Remove files, and folders that are empty afterwards. Targets of links and outside files are not removed."""
    inside = _names_inside(names)
    for name in sorted(present(store, inside)):
        is_folder = not (store.exists(name) or store.is_link(name))
        if not is_folder:
            store.remove(name)
    folders = {str(folder) for name in inside for folder in PurePosixPath(name).parents} - {"."}
    for folder in sorted(folders, reverse=True):  # nested folders first
        if not store.is_link(folder):
            store.below(folder).remove_empty()


def clear_unfinished(store: Store, names: Iterable[str]) -> None:
    """Remove the temporary files that killed writers of `names` have left."""
    for name in list(_unfinished(store, names)):
        store.remove(name)


def has_unfinished(store: Store, names: Iterable[str]) -> bool:
    """Whether `clear_unfinished` would remove anything."""
    return any(True for _ in _unfinished(store, names))


def _unfinished(store: Store, names: Iterable[str]) -> Iterator[str]:
    inside = _names_inside(names)
    for folder in {os.path.dirname(name) for name in inside}:
        for name in _names_below(store, folder):
            final = final_name(name)
            if final is not None and os.path.join(folder, final) in inside:
                yield os.path.join(folder, name)


def present(store: Store, names: Iterable[str]) -> set[str]:
    """Those of the names that exist, as files or links; files below a linked folder do not count."""
    inside = _names_inside(names)
    folders = {os.path.dirname(name) for name in inside}
    return inside & {os.path.join(folder, name) for folder in folders for name in _names_below(store, folder)}


def _names_below(store: Store, folder: str) -> list[str]:
    if not folder:
        return list(store.entries())
    return [] if store.is_link(folder) else list(store.below(folder).entries())


def _indexed(store: Store) -> set[str]:
    """Tensor files that the index lists; empty if it cannot be read."""
    try:
        return _names_inside(store.read_json(INDEX)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _names_inside(values: Iterable[object]) -> set[str]:
    """Those of the values that are names of files inside the directory."""
    return {value for value in values if isinstance(value, str) and is_inside(value)}
