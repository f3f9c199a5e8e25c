"""A lease on a directory: one run at a time writes there, and a small file that is renewed names it.

Clocks are not compared. A run is alive if its lease file changes while another run watches it. It is lost if the file
does not change for `_SILENT_SECONDS`, or at once if its process ran on this machine and no longer exists. A run that
takes over writes a lease with an owner of its own, and every commit checks the owner (a fencing token), so that late
commits of the lost run fail.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Self
from uuid import uuid4

from pipeline.errors import LeaseLost, OutputError, RunError, StoreError, StoreUnavailable
from pipeline.storage.records import LeaseRecord, parse_record
from pipeline.storage.store import Store

LEASE_FILE = ".swsc/lease.json"
# Seconds between two renewals of a lease.
_RENEWAL_SECONDS = 5.0
# Attempts to read a lease that is incomplete because it is being replaced.
_READ_ATTEMPTS = 20
# Seconds without a renewal after which the owner of a lease counts as lost.
_SILENT_SECONDS = 30.0
# Seconds after which two runs that wrote a lease to an object store at the same moment both see the later one.
_SETTLING_SECONDS = 2.0
# Owners of the leases that this process holds.
_held_owners: set[str] = set()

Sleep = Callable[[float], None]


@dataclass(frozen=True)
class Ticket:
    """The right to write into a directory. A value, so that commits on other nodes can prove it.

    Attributes:
        owner: random name of the lease's owner.
        run: digest of what is written. A record of a finished file with another digest does not count as finished work.
    """

    store: Store
    owner: str
    run: str = ""

    def require(self) -> None:
        """Raise RunError if this node does not see the directory's lease, LeaseLost if another run has taken over."""
        lease = _parse(_read(self.store))
        if lease is None:
            raise RunError(
                f"{self.store.root}: node {gethostname()} cannot see the lease of this run, or the run has ended; mount"
                " the output directory on all nodes"
            )
        if lease.owner != self.owner:
            raise LeaseLost(
                f"{self.store.root}: {_describe(lease)} has taken over the directory, so this run stops; its finished"
                " work is kept"
            )


class Lease:
    """A ticket and the thread that renews it."""

    def __init__(self, ticket: Ticket, renewal_seconds: float) -> None:
        """Start to renew `ticket`, whose lease file has been written."""
        self.ticket, self._renewal_seconds = ticket, renewal_seconds
        self._renewals = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_seen_in(self, store: Store) -> bool:
        """Whether this lease is visible in another store too: then both are the same directory under two paths."""
        return _owner_of(store) == self.ticket.owner

    def renew(self) -> None:
        """Write the lease file again, with the next renewal number."""
        self._renewals += 1
        self.ticket.store.put(LEASE_FILE, _lease_json(self.ticket, self._renewals))

    def _keep(self) -> None:
        while not self._released.wait(self._renewal_seconds):
            with suppress(OSError, StoreError):  # a store that does not answer now may do so at the next renewal
                if _owner_of(self.ticket.store) != self.ticket.owner:
                    return  # another run has taken over; the next commit reports it
                self.renew()

    def release(self) -> None:
        """Stop renewing the lease and remove its file."""
        self._released.set()
        self._thread.join()
        _held_owners.discard(self.ticket.owner)
        with suppress(RunError, OSError):
            self.ticket.require()
            self.ticket.store.remove(LEASE_FILE)


def acquire_lease(
    store: Store,
    on_wait: Callable[[str], None] | None = None,
    sleep: Sleep = time.sleep,
    renewal_seconds: float | None = None,
) -> Lease:
    """Acquire the lease on `store`, as soon as no other run holds it.

    Args:
        on_wait: receives one line when a live run holds the lease and this call waits for it. None: do not wait.
        renewal_seconds: seconds between two renewals; None: `_RENEWAL_SECONDS`.

    Raises:
        OutputError: a live run holds the lease.
    """
    while True:
        expired = _await_expiry(store, on_wait, sleep)
        ticket = Ticket(store, uuid4().hex)
        _held_owners.add(ticket.owner)
        try:
            _write_lease(ticket, expired, sleep)
            return Lease(ticket, _RENEWAL_SECONDS if renewal_seconds is None else renewal_seconds)
        except BaseException as error:
            _held_owners.discard(ticket.owner)
            # Of two runs that came at the same moment the other one holds the lease: wait for it.
            if on_wait is None or not isinstance(error, OutputError):
                raise


def require_idle(store: Store, sleep: Sleep = time.sleep) -> None:
    """Raise OutputError if another run writes into `store`.

    It may take `_SILENT_SECONDS` to find that a run is lost.
    """
    _await_expiry(store, None, sleep)


def is_free(store: Store) -> bool:
    """Whether `store` has no lease, or one whose owner is known to be lost without watching it."""
    lease = _parse(_read(store))
    return lease is None or _is_lost(lease)


def is_of_this_machine(store: Store) -> bool:
    """Whether the lease on `store` belongs to a process of this machine, so that `is_free` is certain."""
    lease = _parse(_read(store))
    return lease is not None and lease.machine == machine_id()


def _write_lease(ticket: Ticket, expired: bytes | None, sleep: Sleep) -> None:
    """Write the lease file, in place of the `expired` one; OutputError if another run was faster."""
    store = ticket.store
    with store.locked():
        if _read(store) != expired:
            raise _in_use(store)
        if expired is not None:
            store.remove(LEASE_FILE)
        if not store.create(LEASE_FILE, _lease_json(ticket, 0)):
            raise _in_use(store)
    if not store.is_local:
        sleep(_SETTLING_SECONDS)  # of two runs that write at the same moment the later one wins
    try:
        ticket.require()
    except LeaseLost:
        raise _in_use(store) from None


def _in_use(store: Store) -> OutputError:
    return OutputError(f"{store.root}: {_describe(_parse(_read(store)))} is writing there; wait for it, or stop it")


def _lease_json(ticket: Ticket, renewals: int) -> bytes:
    lease = {"owner": ticket.owner, "machine": machine_id(), "pid": os.getpid(), "beat": renewals}
    return json.dumps(lease).encode()


def _await_expiry(store: Store, on_wait: Callable[[str], None] | None, sleep: Sleep) -> bytes | None:
    """Return the lease file of a lost run as soon as it is known to be lost; None if there is no lease."""
    content, silent_seconds, announced = _read(store), 0.0, False
    while (lease := _parse(content)) is not None and not _is_lost(lease) and silent_seconds < _SILENT_SECONDS:
        sleep(1.0)
        previous, content = content, _read(store)
        silent_seconds += 1.0
        if content not in (None, previous):
            if on_wait is None:
                raise _in_use(store)
            if not announced:
                on_wait(f"{store.root}: {_describe(_parse(content))} writes the same files; waiting for it")
            announced, silent_seconds = True, 0.0
    return content


def _read(store: Store) -> bytes | None:
    """Return the lease file; None if there is none.

    The file may be replaced between the reading of its size and the reading of its bytes, so an incomplete one is read
    again.
    """
    for attempt in range(_READ_ATTEMPTS):
        is_last = attempt == _READ_ATTEMPTS - 1
        try:
            content = bytes(store.read(LEASE_FILE))
        except FileNotFoundError:
            return None
        except StoreError as error:
            # The store has waited for StoreUnavailable already; it would do so again at every attempt.
            if is_last or isinstance(error, StoreUnavailable):
                raise
            continue
        if is_last or _parse(content) is not None:
            break
    return content


def _parse(content: bytes | None) -> LeaseRecord | None:
    """Parse a lease file; None if there is none, or one that is not valid."""
    try:
        return parse_record(LeaseRecord, json.loads(content or b""))
    except (ValueError, RecursionError):
        return None


def _owner_of(store: Store) -> str | None:
    lease = _parse(_read(store))
    return lease.owner if lease else None


def _describe(lease: LeaseRecord | None) -> str:
    """Return "a run on HOST (process PID)"."""
    machine, pid = (lease.machine, lease.pid) if lease else (None, None)
    return f"a run on {str(machine).split()[0]} (process {pid})"


def _is_lost(lease: LeaseRecord) -> bool:
    """Whether the lease belongs to a process of this machine that no longer exists."""
    if lease.machine != machine_id() or lease.pid is None:
        return False
    if lease.pid == os.getpid():
        return lease.owner not in _held_owners
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def machine_id() -> str:
    """Return a name of this machine, boot and process namespace, within which a process number is unique."""
    parts = [gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
