"""Which files of an output are its own, by what its manifest and the records of its runs list: no others are replaced or removed."""

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.checkpoints.weight_files import INDEX, SINGLE, is_adapter
from pipeline.errors import OutputError, UserError
from pipeline.storage.local_files import final_name
from pipeline.storage.store import Store, is_inside

REPORT = "swsc_report.json"
ADAPTER_FILES = (f"{ADAPTER_FOLDER}/adapter_model.safetensors", f"{ADAPTER_FOLDER}/adapter_config.json")
FINISHING = ".swsc/finishing.json"  # names of the files beside tensors that a run was about to write
WRITTEN = ".swsc/files.json"  # names of all files that the run under way writes, and of those that it replaces


def read_list(store: Store, name: str) -> list[str]:
    """A list of names that we wrote; empty if it is not there, OutputError if it is no such list."""
    try:
        value = store.read_json(name) if store.exists(name) else []
        if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise ValueError("no list of names")
    except ValueError as error:
        raise OutputError(f"{store.root}: {name} is damaged ({error}); remove it, then run again") from None
    return sorted(_inside(value))


def owned(store: Store) -> set[str]:
    """Names of the files of a finished output, or of one that is under way, as far as what lists them can be read.

    A file in a folder may be somebody else's whatever a manifest says: it counts if its bytes are as listed.
    """
    names, manifest = _recorded(store), _manifest(store)
    if manifest is None:  # damaged: the index knows the tensor files at least
        return names | {INDEX, "config.json", *_indexed(store)}
    return names | {name for name, about in manifest.items() if "/" not in name or _is_as_listed(store, name, about)}


def require_no_others(store: Store, names: Iterable[str]) -> None:
    """Raise OutputError if a file that is to be written lies there already and is not the output's own."""
    manifest = _manifest(store)
    if manifest is None or (store.exists(RUN) and not store.exists(WRITTEN)):
        return  # the list is damaged, or the run was begun by an earlier release, which had none
    if others := sorted(present(store, names) - _recorded(store) - manifest.keys()):
        raise OutputError(
            f"{store.root}: {others[0]} is there and would be replaced, but is not a file of this output; move it, or choose"
            " another directory"
        )


def rivals(store: Store, own: Collection[str]) -> list[str]:
    """Files directly in an output, none of its `own`, that `from_pretrained` reads in place of its weights, or applies to them."""
    return [name for name in store.names() if (name == SINGLE or is_adapter(name)) and name not in own]


def require_no_rivals(store: Store) -> None:
    """Raise OutputError for a file of the user that would be opened in place of what is written, or together with it."""
    manifest = _manifest(store)
    if manifest is not None and (found := rivals(store, manifest.keys() | _recorded(store))):
        raise OutputError(
            f"{store.root}: {found[0]} is not a file of this output, and from_pretrained would read it in place of the output's"
            " own, or apply it to them; move it away"
        )


def _recorded(store: Store) -> set[str]:
    """Names that the records of a run list."""
    records = {name.removesuffix(".json") for name in _names_below(store, FINISHED_FOLDER)}
    return {*read_list(store, FINISHING), *read_list(store, WRITTEN), *records, REPORT, MANIFEST}


def _manifest(store: Store) -> dict[str, Any] | None:
    """Name of each file that the manifest lists -> what it says of it; None if it is damaged."""
    try:
        files = dict(store.read_json(MANIFEST)["files"])
        return {name: files[name] for name in _inside(files)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        return None


def _is_as_listed(store: Store, name: str, about: Any) -> bool:
    """Whether a file is the very one that a manifest lists, or that of an adapter, whose names are ours."""
    try:
        return name in ADAPTER_FILES or not file_differences(store, name, about)
    except (UserError, KeyError, TypeError):
        return False


def clear(store: Store, names: Collection[str]) -> None:
    """Remove files, and folders that are empty then; nothing that a link leads to, and nothing outside."""
    inside = _inside(names)
    for name in sorted(present(store, inside)):
        if store.exists(name) or store.is_link(name):  # and no folder
            store.remove(name)
    folders = {str(folder) for name in inside for folder in PurePosixPath(name).parents} - {"."}
    for folder in sorted(folders, reverse=True):  # those within others first
        if not store.is_link(folder):
            store.below(folder).remove_empty()


def clear_unfinished(store: Store, names: Iterable[str]) -> None:
    """Remove what writers of files that were killed have left beside them."""
    for name in list(_unfinished(store, names)):
        store.remove(name)


def has_unfinished(store: Store, names: Iterable[str]) -> bool:
    """Whether there is something that `clear_unfinished` would remove."""
    return any(True for _ in _unfinished(store, names))


def _unfinished(store: Store, names: Iterable[str]) -> Iterator[str]:
    wanted = _inside(names)
    for folder in {os.path.dirname(name) for name in wanted}:
        for name in _names_below(store, folder):
            meant = final_name(name)
            if meant is not None and os.path.join(folder, meant) in wanted:
                yield os.path.join(folder, name)


def present(store: Store, names: Iterable[str]) -> set[str]:
    """Those of the names that are there, be it as a link; not what lies behind a linked folder."""
    wanted = _inside(names)
    folders = {os.path.dirname(name) for name in wanted}
    return wanted & {os.path.join(folder, name) for folder in folders for name in _names_below(store, folder)}


def _names_below(store: Store, folder: str) -> list[str]:
    if not folder:
        return list(store.entries())
    return [] if store.is_link(folder) else list(store.below(folder).entries())


def _indexed(store: Store) -> set[str]:
    """Tensor files that the index names, where it can be read."""
    try:
        return _inside(store.read_json(INDEX)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _inside(values: Iterable[Any]) -> set[str]:
    """Those that are names of files in the directory."""
    return {value for value in values if isinstance(value, str) and is_inside(value)}
