"""Compares the paths of sources, outputs and caches: whether two are the same directory, or one contains the other.

On a disk the file system decides: device and inode of a directory and of its parents identify it behind links, `..`,
bind mounts and names that differ in case. A bind mount of a folder hides the parents of that folder; the mount table of
the kernel has them. In an object store a prefix contains another one at folder boundaries.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.errors import OutputError
from pipeline.storage.filesystems import SCHEMES
from pipeline.storage.store import Store

_MOUNT_TABLE = Path("/proc/self/mountinfo")
# Octal escapes of spaces and the like in the mount table.
_ESCAPED = re.compile(r"\\([0-7]{3})")
# Device and inode.
_Inode = tuple[int, int]
# Device, and path within its file system.
_Origin = tuple[str, str]


@dataclass(frozen=True)
class UserPath:
    """A path, and the argument or flag that it was given by.

    Attributes:
        label: `MODEL`, `--text`, …
    """

    label: str
    store: Store

    @classmethod
    def at(cls, label: str, location: str) -> Self:
        """Create the path of a location; UserError if it is not a valid one."""
        return cls(label, Store.at(location))


def require_disjoint_paths(written: UserPath, read: Iterable[UserPath]) -> None:
    """Raise OutputError if the path that is written equals, contains or is inside one of the paths that are read."""
    for path in read:
        if contains(written.store, path.store) and contains(path.store, written.store):
            raise _overlap(written, f"{written.label} and {path.label} are the same directory")
        require_outside(written, [path])
        if contains(written.store, path.store):
            raise _overlap(written, f"{path.label} ({path.store.root}) is inside {written.label}")


def require_outside(written: UserPath, read: Iterable[UserPath]) -> None:
    """Raise OutputError if the path that is written equals or is inside one of the paths that are read."""
    for path in read:
        if contains(path.store, written.store):
            raise _overlap(written, f"{written.label} is inside {path.label} ({path.store.root})")


def _overlap(written: UserPath, problem: str) -> OutputError:
    return OutputError(f"{written.store.root}: {problem} and would change it; choose another {written.label}")


def require_directory(store: Store) -> None:
    """Raise OutputError if a file or a broken link at `store`, or above it, prevents a directory there."""
    if not store.is_local:
        return
    existing = next(path for path in _with_parents(store.root) if os.path.lexists(path))
    if not os.path.isdir(existing):
        kind = "not a directory" if os.path.exists(existing) else "a broken link"
        raise OutputError(f"{existing}: {kind}; choose another path, or remove it")


def user_paths(arguments: Iterable[tuple[str, str | None]]) -> list[UserPath]:
    """Return the paths among (label, location) pairs; skips absent ones, data sets of the Hub and web pages."""
    given = [(label, location) for label, location in arguments if location]
    return [UserPath.at(label, location) for label, location in given if _is_path(location)]


def _is_path(location: str) -> bool:
    scheme, separator, _ = location.partition("://")
    return scheme in ("file", *SCHEMES) if separator else os.path.exists(location)


def links_outside(store: Store, name: str) -> bool:
    """Whether a link leads from `name` out of the directory, unless it leads to a blob of the Hub's cache."""
    inside = _below(os.path.realpath(store.root), os.path.realpath(f"{store.root}/{name}"))
    return store.is_link(name) and not (inside or is_hub_blob(store, name))


def is_hub_blob(store: Store, name: str) -> bool:
    """Whether `name` is a link from a snapshot in the Hub's cache to a blob of the same model.

    The folder of blobs may be a link itself, in a cache whose files were moved to a larger disk.
    """
    parents, target = _with_parents(os.path.realpath(store.root)), os.path.realpath(f"{store.root}/{name}")
    caches = [os.path.dirname(path) for path in parents if os.path.basename(path) == "snapshots"]
    return store.is_link(name) and any(target.startswith(f"{os.path.realpath(f'{cache}/blobs')}/") for cache in caches)


def contains(outer: Store, inner: Store) -> bool:
    """Whether `inner` equals `outer` or is below it. Neither has to exist."""
    if not (outer.is_local and inner.is_local):
        return _below(outer.root, inner.root)
    outer_path, inner_path = os.path.realpath(outer.root), os.path.realpath(inner.root)
    if _below(outer_path, inner_path):
        return True
    outer_base, outer_missing = _split_existing(outer_path)
    inner_base, inner_missing = _split_existing(inner_path)
    if outer_missing:  # a directory that does not exist yet contains only paths that do not exist either
        is_prefix = inner_missing[: len(outer_missing)] == outer_missing
        return _inode(outer_base) == _inode(inner_base) and is_prefix
    return _inode(outer_path) in map(_inode, _with_parents(inner_base)) or _contains_by_mounts(outer_path, inner_path)


def _below(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer.rstrip('/')}/")


def _with_parents(path: str) -> Iterator[str]:
    """Yield a path, then each of its parents."""
    yield path
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def _inode(path: str) -> _Inode | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _split_existing(path: str) -> tuple[str, tuple[str, ...]]:
    """Split a path into its longest existing part and the names below that."""
    base = next((parent for parent in _with_parents(path) if _inode(parent)), "/")
    return base, Path(path).relative_to(base).parts


def _contains_by_mounts(outer: str, inner: str) -> bool:
    """Whether `outer` contains `inner` by the mount table. Both paths are without links."""
    mounts = _mounts()
    inner_device, inner_folder = _origin(mounts, inner)
    origins = [_origin(mounts, outer), *(origin for point, origin in mounts if _below(outer, point))]
    return any(device == inner_device and _below(folder, inner_folder) for device, folder in origins if inner_device)


def _mounts() -> list[tuple[str, _Origin]]:
    """Return (mount point, origin) pairs, the latest mount last; empty if the kernel has no mount table."""
    try:
        lines = _MOUNT_TABLE.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    rows = [[_ESCAPED.sub(lambda escape: chr(int(escape[1], 8)), word) for word in line.split()[:5]] for line in lines]
    return [(point, (device, root)) for _, _, device, root, point in rows]


def _origin(mounts: list[tuple[str, _Origin]], path: str) -> _Origin:
    """Return the device of a path and its path within the file system; ("", "") if they are unknown."""
    above = [(point, origin) for point, origin in mounts if _below(point, path)]
    if not above:
        return "", ""
    point, (device, root) = max(reversed(above), key=lambda mount: len(mount[0]))
    return device, os.path.normpath(os.path.join(root, os.path.relpath(path, point)))
