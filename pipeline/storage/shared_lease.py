"""Who reads a directory of a cache that runs share: it is removed by the last of them, and by nobody before.

A use is a lease in a folder of its own, `uses/NAME/…` beside the directory NAME. A run that is killed keeps nothing for long: its
lease counts as one that is gone. Uses are noted, and directories removed, under one lock where the disk has locks; elsewhere two runs
that do both within the same moment are not told apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from pipeline.errors import OutputError
from pipeline.storage.lease import LEASE_FILE, acquire_lease, is_free, is_of_this_machine, require_idle
from pipeline.storage.store import Store

_USES = "uses"


@contextmanager
def shared_lease(store: Store) -> Iterator[None]:
    """Keep the directory `store`, which may not be there yet, from being removed by other runs."""
    own = _uses(store).below(uuid4().hex)
    with store.parent.locked():
        lease = acquire_lease(own)
    try:
        yield
    finally:
        lease.release()
        with store.parent.locked():  # another run may be making a folder in the one that is empty now
            _forget(store, own)


def remove_if_unleased(store: Store) -> bool:
    """Remove the directory `store` with all that is in it, if no other run uses it; returns whether that was so."""
    gone = [one for one in _users(store) if one.exists(LEASE_FILE) and _is_gone(one)]
    with store.parent.locked():
        for one in gone:
            _forget(store, one)
        if any(one.exists(LEASE_FILE) for one in _users(store)):
            return False
        store.parent.remove(store.name)
    store.parent.remove_empty()
    return True


def _uses(store: Store) -> Store:
    return store.parent.below(_USES).below(store.name)


def _users(store: Store) -> list[Store]:
    uses = _uses(store)
    return [uses.below(name) for name in uses.entries()]


def _is_gone(user: Store) -> bool:
    """Whether a run that noted a use is no longer there; of one on another machine that takes a while to learn."""
    if is_free(user):
        return True
    if is_of_this_machine(user):
        return False
    try:
        require_idle(user)
    except OutputError:
        return False
    return True


def _forget(store: Store, user: Store) -> None:
    _uses(store).remove(user.name)
    for folder in (_uses(store), store.parent.below(_USES)):
        folder.remove_empty()
