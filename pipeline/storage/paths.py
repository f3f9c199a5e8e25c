"""Whether two locations are one place, or one lies inside the other, by whatever paths they are named.

On a disk, identity is asked of the file system: device and inode of a directory and of all above it see through links, `..`, bind
mounts and names that differ in case. A bind mount of a folder hides what is above that folder; the kernel's table of mounts says
it. In an object store one prefix lies inside another at the boundaries of folders.
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
_ESCAPED = re.compile(r"\\([0-7]{3})")  # how the table of mounts has spaces and the like
_Inode = tuple[int, int]  # device, inode
_Origin = tuple[str, str]  # device, path within its file system


@dataclass(frozen=True)
class UserPath:
    """A location, and what the user calls it: `MODEL`, `--text`."""

    what: str
    store: Store

    @classmethod
    def at(cls, what: str, location: str) -> Self:
        return cls(what, Store.at(location))


def require_disjoint_paths(written: UserPath, others: Iterable[UserPath]) -> None:
    """Raise OutputError if what is to be written is one of the others, lies inside one, or holds one."""
    for other in others:
        if contains(written.store, other.store) and contains(other.store, written.store):
            raise _overlap(written, f"{written.what} and {other.what} are the same place")
        require_outside(written, [other])
        if contains(written.store, other.store):
            raise _overlap(written, f"{other.what} ({other.store.root}) lies inside {written.what}")


def require_outside(written: UserPath, others: Iterable[UserPath]) -> None:
    """Raise OutputError if what is to be written is one of the others, or lies inside one."""
    for other in others:
        if contains(other.store, written.store):
            raise _overlap(written, f"{written.what} lies inside {other.what} ({other.store.root})")


def _overlap(written: UserPath, how: str) -> OutputError:
    return OutputError(f"{written.store.root}: {how}, and would change it; choose another {written.what}")


def require_directory(store: Store) -> None:
    """Raise OutputError if there can be no such directory: a file is in its place, or above it, or a link that leads nowhere."""
    if not store.is_local:
        return
    above = next(path for path in _upwards(store.root) if os.path.lexists(path))
    if not os.path.isdir(above):
        kind = "not a directory" if os.path.exists(above) else "a link that leads nowhere"
        raise OutputError(f"{above}: {kind}; choose another place, or take it away")


def user_paths(places: Iterable[tuple[str, str | None]]) -> list[UserPath]:
    """Places of what the user named, by what it is called; without what is no place of ours: data sets, pages of the web."""
    given = [(what, location) for what, location in places if location]
    return [UserPath.at(what, location) for what, location in given if _is_ours(location)]


def _is_ours(location: str) -> bool:
    scheme, separator, _ = location.partition("://")
    return scheme in ("file", *SCHEMES) if separator else os.path.exists(location)


def links_outside(store: Store, name: str) -> bool:
    """Whether a link, the file's own or one of a folder, leads out of the directory, and to no blob of its cache of the Hub."""
    inside = _below(os.path.realpath(store.root), os.path.realpath(f"{store.root}/{name}"))
    return store.is_link(name) and not (inside or is_hub_blob(store, name))


def is_hub_blob(store: Store, name: str) -> bool:
    """Whether a link in a cache of the Hub leads, as it should, from a snapshot or a folder of it to a blob of the same model.

    The folder of blobs may be a link itself: a cache whose bytes were moved to a larger disk.
    """
    above, target = _upwards(os.path.realpath(store.root)), os.path.realpath(f"{store.root}/{name}")
    caches = [os.path.dirname(one) for one in above if os.path.basename(one) == "snapshots"]
    return store.is_link(name) and any(target.startswith(f"{os.path.realpath(f'{cache}/blobs')}/") for cache in caches)


def contains(outer: Store, inner: Store) -> bool:
    """Whether `inner` is `outer` or lies somewhere below it; neither has to be there."""
    if not (outer.is_local and inner.is_local):
        return _below(outer.root, inner.root)
    first, second = os.path.realpath(outer.root), os.path.realpath(inner.root)
    if _below(first, second):
        return True
    (base, missing), (other, below) = _existing(first), _existing(second)
    if missing:  # what is yet to be made holds only what is to be made, too
        return _inode(base) == _inode(other) and below[: len(missing)] == missing
    return _inode(first) in map(_inode, _upwards(other)) or _by_mounts(first, second)


def _below(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer.rstrip('/')}/")


def _upwards(path: str) -> Iterator[str]:
    """A path and all above it."""
    yield path
    while (above := os.path.dirname(path)) != path:
        yield above
        path = above


def _inode(path: str) -> _Inode | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _existing(path: str) -> tuple[str, tuple[str, ...]]:
    """The part of a path that is there, and the names below it that are not."""
    base = next((one for one in _upwards(path) if _inode(one)), "/")
    return base, Path(path).relative_to(base).parts


def _by_mounts(outer: str, inner: str) -> bool:
    """Whether `inner` is reached from `outer` by what is mounted where; both are without links."""
    mounts = _mounts()
    device, path = _origin(mounts, inner)
    reached = [_origin(mounts, outer), *(origin for point, origin in mounts if _below(outer, point))]
    return any(own == device and _below(folder, path) for own, folder in reached if device)


def _mounts() -> list[tuple[str, _Origin]]:
    """Mount point -> what is mounted there, the latest last; nothing where the kernel has no such table."""
    try:
        lines = _MOUNT_TABLE.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    rows = [[_ESCAPED.sub(lambda found: chr(int(found[1], 8)), word) for word in line.split()[:5]] for line in lines]
    return [(point, (device, root)) for _, _, device, root, point in rows]


def _origin(mounts: list[tuple[str, _Origin]], path: str) -> _Origin:
    """Where a path lies in its file system; ("", "") where that is not known."""
    found = [(point, origin) for point, origin in mounts if _below(point, path)]
    if not found:
        return "", ""
    point, (device, root) = max(reversed(found), key=lambda one: len(one[0]))
    return device, os.path.normpath(os.path.join(root, os.path.relpath(path, point)))
