"""Leases of the runs that share a directory of a cache: the last of them removes it, and nobody before.

The leases on the directory NAME are folders beside it, `uses/NAME/…`, each with a lease file. A holder is the folder of
one lease. The lease of a killed run
expires like any other. Leases are taken, and directories removed, under one lock where the disk has locks. In an object
store two runs that do both at the same moment can conflict.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from pipeline.errors import OutputError
from pipeline.storage.lease import LEASE_FILE, acquire_lease, is_free, is_of_this_machine, require_idle
from pipeline.storage.store import Store

_LEASES_FOLDER = "uses"


@contextmanager
def shared_lease(store: Store) -> Iterator[None]:
    """Keep other runs from removing the directory `store`, which may not exist yet, while the context is entered."""
    holder = _leases_of(store).below(uuid4().hex)
    with store.parent.locked():
        lease = acquire_lease(holder)
    try:
        yield
    finally:
        lease.release()
        with store.parent.locked():  # another run may be creating a folder in the one that is empty now
            _remove_holder(store, holder)


def remove_if_unleased(store: Store) -> bool:
    """Remove the directory `store` with its contents unless another run holds a lease on it.

    Returns:
        Whether the directory was removed.
    """
    expired = [holder for holder in _holders(store) if holder.exists(LEASE_FILE) and _has_expired(holder)]
    with store.parent.locked():
        for holder in expired:
            _remove_holder(store, holder)
        if any(holder.exists(LEASE_FILE) for holder in _holders(store)):
            return False
        store.parent.remove(store.name)
    store.parent.remove_empty()
    return True


def _leases_of(store: Store) -> Store:
    return store.parent.below(_LEASES_FOLDER).below(store.name)


def _holders(store: Store) -> list[Store]:
    leases = _leases_of(store)
    return [leases.below(name) for name in leases.entries()]


def _has_expired(holder: Store) -> bool:
    """Whether the run that took a lease is lost. For a run on another machine the lease is watched for a while."""
    if is_free(holder):
        return True
    if is_of_this_machine(holder):
        return False
    try:
        require_idle(holder)
    except OutputError:
        return False
    return True


def _remove_holder(store: Store, holder: Store) -> None:
    _leases_of(store).remove(holder.name)
    for folder in (_leases_of(store), store.parent.below(_LEASES_FOLDER)):
        folder.remove_empty()
