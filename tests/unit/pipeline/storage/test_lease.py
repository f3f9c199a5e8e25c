"""Claims about the right to write into a directory. Nothing here waits: time passes where the code would sleep."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LeaseLost, OutputError, RunError, StoreOutage
from pipeline.storage.lease import LEASE_FILE, Ticket, acquire_lease, machine_id
from pipeline.storage.store import Store
from tests.support.project import ROOT


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def foreign(store: Store, **about: Any) -> dict[str, Any]:
    """A lease of a run on another machine."""
    lease = {"owner": "another", "machine": "far away", "pid": 1, "beat": 1, **about}
    store.write_json(LEASE_FILE, lease)
    return lease


_GONE = json.dumps({"owner": "gone", "machine": machine_id(), "pid": os.getpid(), "beat": 3}).encode()


class Seconds:
    """Sleeping that takes no time; another run may do something at each second."""

    def __init__(self, *events: Any) -> None:
        self.passed, self.events = 0.0, list(events)

    def __call__(self, seconds: float) -> None:
        self.passed += seconds
        if self.events:
            self.events.pop(0)()


def test_a_directory_that_nobody_writes_into_is_free_at_once(store: Store) -> None:
    lease = acquire_lease(store, sleep=Seconds())
    lease.ticket.require()
    lease.release()
    assert not store.exists(LEASE_FILE)


def test_the_second_run_is_refused_while_the_first_one_lives(store: Store) -> None:
    first = acquire_lease(store)
    with pytest.raises(OutputError, match=r"a run on .* \(process \d+\) is writing there"):
        acquire_lease(store, sleep=Seconds(first.renew))
    first.ticket.require()
    first.release()


def test_a_run_elsewhere_that_gives_no_sign_of_life_is_replaced(store: Store) -> None:
    foreign(store)
    time = Seconds()
    lease = acquire_lease(store, sleep=time)
    assert 10 < time.passed < 60
    lease.release()


def test_a_running_owner_is_waited_for_on_request(store: Store) -> None:
    foreign(store)
    messages: list[str] = []
    signs = [lambda: foreign(store, beat=2), lambda: foreign(store, beat=3), lambda: store.remove(LEASE_FILE)]
    time = Seconds(*signs)
    lease = acquire_lease(store, on_wait=messages.append, sleep=time)
    assert time.passed == 3
    assert len(messages) == 1
    assert "a run on far (process 1)" in messages[0]
    lease.release()


def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(store: Store) -> None:
    script = f"from pipeline.storage.lease import *; acquire_lease(Store({store.root!r})); import os; os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 9
    assert store.exists(LEASE_FILE)
    time = Seconds()
    acquire_lease(store, sleep=time).release()
    assert time.passed == 0


def test_what_a_replaced_run_still_sends_is_refused(store: Store) -> None:
    first = acquire_lease(store)
    foreign(store)
    with pytest.raises(LeaseLost, match=r"a run on far \(process 1\) has taken over"):
        first.ticket.require()
    first.release()
    assert store.read_json(LEASE_FILE)["owner"] == "another", "and it does not touch what is no longer its own"


def test_a_node_that_does_not_see_the_directory_raises(store: Store) -> None:
    lease = acquire_lease(store)
    store.remove(LEASE_FILE)
    with pytest.raises(RunError, match="cannot see the lease"):
        lease.ticket.require()
    lease.release()


@pytest.mark.parametrize("left", ["nothing", "a lease of a run that is gone", "half a lease"])
def test_of_many_simultaneous_acquisitions_one_succeeds(store: Store, left: str) -> None:
    many, found, patience = 6, [], threading.Event()
    for _ in range(20):
        if left != "nothing":
            store.put(LEASE_FILE, b"{" if left == "half a lease" else _GONE)
        start = threading.Barrier(many)

        def wait_briefly(seconds: float) -> None:
            patience.wait(seconds / 50)

        def come(start: threading.Barrier = start) -> Any:
            start.wait()
            try:
                return acquire_lease(store, sleep=wait_briefly, renewal_seconds=0.002)
            except OutputError as error:
                return error

        with ThreadPoolExecutor(many) as pool:
            found = [one.result() for one in [pool.submit(come) for _ in range(many)]]
        have = [one for one in found if not isinstance(one, OutputError)]
        assert len(have) == 1
        have[0].ticket.require()
        have[0].release()


def test_a_run_that_was_asleep_until_its_successor_was_done_does_not_sign_again(store: Store) -> None:
    lease = acquire_lease(store, sleep=Seconds(), renewal_seconds=0.2)
    store.remove(LEASE_FILE)
    threading.Event().wait(0.5)
    assert not store.exists(LEASE_FILE)
    with pytest.raises(RunError):
        lease.ticket.require()
    lease.release()


def test_one_that_was_put_into_the_place_of_an_old_one_is_not_cleared_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two found the same old lease.

    The other one was faster, and has signed by the time that ours clears the old one away.
    """
    store.put(LEASE_FILE, _GONE)
    real = Store.locked

    def locked(self: Store) -> AbstractContextManager[None]:
        foreign(store)
        return real(self)

    monkeypatch.setattr(Store, "locked", locked)
    with pytest.raises(OutputError, match=r"a run on far \(process 1\) is writing there"):
        acquire_lease(store, sleep=Seconds())
    assert store.read_json(LEASE_FILE)["owner"] == "another"


def test_of_two_simultaneous_acquisitions_one_waits_for_the_other_on_request(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, faster = Store.locked, iter([lambda: foreign(store)])

    def locked(self: Store) -> AbstractContextManager[None]:
        next(faster, lambda: {})()
        return real(self)

    monkeypatch.setattr(Store, "locked", locked)
    signs = [lambda: foreign(store, beat=2), lambda: store.remove(LEASE_FILE)]
    messages: list[str] = []
    lease = acquire_lease(store, on_wait=messages.append, sleep=Seconds(*signs))
    lease.ticket.require()
    assert len(messages) == 1
    lease.release()


def test_a_directory_that_is_removed_concurrently_is_created_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was done in it has removed it, empty, just before it is locked."""
    real, first = os.open, iter([lambda: os.rmdir(store.root)])

    def opened(path: Any, *how: Any, **further: Any) -> int:
        if path == store.root:
            next(first, lambda: None)()
        return real(path, *how, **further)

    monkeypatch.setattr(os, "open", opened)
    with acquire_lease(store) as lease:
        lease.ticket.require()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lease_that_nobody_can_read_holds_nothing_up(store: Store, content: str) -> None:
    store.write(LEASE_FILE, [content.encode()])
    time = Seconds()
    acquire_lease(store, sleep=time).release()
    assert time.passed == 0


def test_a_lease_that_grows_while_it_is_read_is_read_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tenth sign of life is a byte longer: who had looked at the length before it saw less than a lease."""
    size, beats = Store.size, iter([b'{"owner": "me", "beat": 10}'])

    def size_before_a_beat(self: Store, name: str) -> int:
        found = size(self, name)
        if beat := next(beats, b""):
            self.put(LEASE_FILE, beat)
        return found

    store.put(LEASE_FILE, b'{"owner": "me", "beat": 9}')
    monkeypatch.setattr(Store, "size", size_before_a_beat)
    Ticket(store, "me").require()
    assert store.read_json(LEASE_FILE)["beat"] == 10


def test_a_store_that_is_gone_is_asked_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question takes as long as the client is patient; the run's end waited for twenty of them."""
    asked = []

    def gone(self: Store, name: str) -> int:
        asked.append(name)
        raise StoreOutage("s3://bucket: no good answer for 30 s")

    monkeypatch.setattr(Store, "size", gone)
    with pytest.raises(StoreOutage):
        acquire_lease(store)
    assert asked == [LEASE_FILE]
