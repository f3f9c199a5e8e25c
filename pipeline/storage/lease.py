"""One run at a time on one directory: a small file says who writes there, and is renewed while it does.

Clocks are not asked: a run is alive if its file changes while another one looks, and gone if it does not for _SILENT seconds,
or at once if its process is of this machine and no longer there. Whoever takes the place of a run that is gone signs with a
ticket of its own, and what the other one may still send is refused: every commit shows its ticket.
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
from typing import Any, Self
from uuid import uuid4

from pipeline.errors import OutputError, RunError, StoreError, StoreUnavailable
from pipeline.storage.records import LeaseRecord, check_record
from pipeline.storage.store import Store

LEASE_FILE = ".swsc/lease.json"
_RENEWAL_SECONDS = 5.0  # seconds after which a run renews its lease
_READ_ATTEMPTS = 20  # at a lease that is not whole
_SILENT_SECONDS = 30.0  # seconds without a sign of life after which it is taken for gone
_SETTLING_SECONDS = (
    2.0  # seconds after which two that signed at the same moment in an object store know who was the later one
)
_held_owners: set[str] = set()  # tickets of this process


class LeaseLost(RunError):
    """Another run has taken this one's place."""


@dataclass(frozen=True)
class Ticket:
    """The right to write into a directory; a value, so that commits on other nodes can show it.

    Attributes:
        run: what is written there, as a digest; a record that bears another one is not taken for finished work.
    """

    store: Store
    owner: str
    run: str = ""

    def require(self) -> None:
        """Raise RunError if the directory is not seen from here, LeaseLost if another run has taken over."""
        found = _understood(_read(self.store))
        if found is None:
            raise RunError(
                f"{self.store.root}: not seen by node {gethostname()}, or done with; all nodes must see the output"
            )
        if found["owner"] != self.owner:
            raise LeaseLost(f"{self.store.root}: {_who(found)} has taken over; this one is stopped, nothing is lost")


class Lease:
    """A ticket and the thread that keeps it valid."""

    def __init__(self, ticket: Ticket) -> None:
        """Begin to keep `ticket`, which has been signed for."""
        self.ticket = ticket
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_seen_in(self, other: Store) -> bool:
        """Whether what stands in our place appears in another one, too: both are one, whatever their paths are."""
        return (_understood(_read(other)) or {}).get("owner") == self.ticket.owner

    def renew(self) -> None:
        """Give a sign of life."""
        self._beats += 1
        self.ticket.store.put(LEASE_FILE, _signed(self.ticket, self._beats))

    def _keep(self) -> None:
        while not self._over.wait(_RENEWAL_SECONDS):
            with suppress(OSError, StoreError):  # a store that does not answer now may do so at the next beat
                if (_understood(_read(self.ticket.store)) or {}).get("owner") != self.ticket.owner:
                    return  # taken over, or done with by who took over: commits will say so
                self.renew()

    def release(self) -> None:
        """Give the ticket back."""
        self._over.set()
        self._thread.join()
        _held_owners.discard(self.ticket.owner)
        with suppress(RunError, OSError):
            self.ticket.require()
            self.ticket.store.remove(LEASE_FILE)


def acquire_lease(
    store: Store, on_wait: Callable[[str], None] | None = None, sleep: Callable[[float], None] = time.sleep
) -> Lease:
    """The right to write into `store`, as soon as no other run has it.

    Args:
        on_wait: told, in a line, that and for whom we wait; None: do not wait for a run that is alive.

    Raises:
        OutputError: another run is at work there.
    """
    while True:
        left = _await_silence(store, on_wait, sleep)
        ticket = Ticket(store, uuid4().hex)
        _held_owners.add(ticket.owner)
        try:
            _sign(ticket, left, sleep)
            return Lease(ticket)
        except BaseException as error:
            _held_owners.discard(ticket.owner)
            if on_wait is None or not isinstance(
                error, OutputError
            ):  # of two that came at the same moment the other one has it
                raise


def require_idle(store: Store, sleep: Callable[[float], None] = time.sleep) -> None:
    """Raise OutputError if another run writes into `store`; to learn that one is gone may take a while."""
    _await_silence(store, None, sleep)


def is_free(store: Store) -> bool:
    """Whether nobody writes into `store`, as far as that shows at once."""
    about = _understood(_read(store))
    return about is None or _is_gone(about)


def is_of_this_machine(store: Store) -> bool:
    """Whether who writes into `store` is a process of this machine, so that `is_free` says for sure whether it is gone."""
    return (_understood(_read(store)) or {}).get("machine") == machine_id()


def _sign(ticket: Ticket, left: bytes | None, sleep: Callable[[float], None]) -> None:
    """Put our lease there, in the place of one that was `left`; OutputError if another run was faster."""
    store = ticket.store
    with store.locked():
        if _read(store) != left:
            raise _taken(store)
        if left is not None:
            store.remove(LEASE_FILE)
        if not store.create(LEASE_FILE, _signed(ticket, 0)):
            raise _taken(store)
    if not store.is_local:
        sleep(_SETTLING_SECONDS)  # of two that came at the same moment the later one has it
    try:
        ticket.require()
    except LeaseLost:
        raise _taken(store) from None


def _taken(store: Store) -> OutputError:
    who = _who(_understood(_read(store)) or {})
    return OutputError(f"{store.root}: {who} is writing there; wait for it, or stop it")


def _signed(ticket: Ticket, beat: int) -> bytes:
    about = {"owner": ticket.owner, "machine": machine_id(), "pid": os.getpid(), "beat": beat}
    return json.dumps(about).encode()


def _await_silence(store: Store, on_wait: Callable[[str], None] | None, sleep: Callable[[float], None]) -> bytes | None:
    """The lease of a run that is gone, as soon as it is; None if there is no lease."""
    before, waited, told = _read(store), 0.0, False
    while (about := _understood(before)) is not None and not _is_gone(about) and waited < _SILENT_SECONDS:
        sleep(1.0)
        found, waited = _read(store), waited + 1.0
        if found not in (None, before):
            if on_wait is None:
                raise _taken(store)
            if not told:
                on_wait(f"{store.root}: {_who(_understood(found) or {})} is making the same; waiting for it")
            told, waited = True, 0.0
        before = found
    return before


def _read(store: Store) -> bytes | None:
    """The lease as it lies there; None if there is none.

    It may be replaced between the look at its length and the look at its bytes: what is not whole is looked at again.
    """
    for look in range(_READ_ATTEMPTS):
        last = look == _READ_ATTEMPTS - 1
        try:
            raw = bytes(store.read(LEASE_FILE))
        except FileNotFoundError:
            return None
        except StoreError as error:
            if last or isinstance(
                error, StoreUnavailable
            ):  # who would wait for each look in turn for as long as for one
                raise
            continue
        if last or _understood(raw) is not None:
            break
    return raw


def _understood(raw: bytes | None) -> dict[str, Any] | None:
    """What a lease says; None if there is none, or none that can be understood."""
    try:
        return check_record(LeaseRecord, json.loads(raw or b""))
    except (ValueError, RecursionError):
        return None


def _who(about: dict[str, Any]) -> str:
    return f"a run on {str(about.get('machine')).split()[0]} (process {about.get('pid')})"


def _is_gone(about: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no longer there."""
    if about.get("machine") != machine_id():
        return False
    if about.get("pid") == os.getpid():
        return about["owner"] not in _held_owners
    try:
        os.kill(int(about["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def machine_id() -> str:
    """A name of this machine since it was started, as far as its process numbers mean the same."""
    parts = [gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
