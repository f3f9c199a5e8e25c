"""Claims about the right to write into a directory. Nothing here waits: time passes where the code would sleep."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import OutputError, RunError
from pipeline.model.lease import LEASE, LeaseLost, acquire
from pipeline.model.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def foreign(store: Store, **about: Any) -> dict[str, Any]:
    """A lease of a run on another machine."""
    lease = {"owner": "another", "machine": "far away", "pid": 1, "beat": 1, **about}
    store.write_json(LEASE, lease)
    return lease


class Seconds:
    """Sleeping that takes no time; another run may do something at each second."""

    def __init__(self, *events: Any) -> None:
        self.passed, self.events = 0.0, list(events)

    def __call__(self, seconds: float) -> None:
        self.passed += seconds
        if self.events:
            self.events.pop(0)()


def test_a_directory_that_nobody_writes_into_is_free_at_once(store: Store) -> None:
    lease = acquire(store, sleep=Seconds())
    lease.ticket.require()
    lease.release()
    assert not store.exists(LEASE)


def test_the_second_run_is_refused_while_the_first_one_lives(store: Store) -> None:
    first = acquire(store)
    with pytest.raises(OutputError, match=r"a run on .* \(process \d+\) is writing there; wait for it, or stop it"):
        acquire(store, sleep=Seconds(first.renew))
    first.ticket.require()
    first.release()


def test_a_run_elsewhere_that_gives_no_sign_of_life_is_replaced(store: Store) -> None:
    foreign(store)
    time = Seconds()
    lease = acquire(store, sleep=time)
    assert 10 < time.passed < 60
    lease.release()


def test_one_that_does_is_waited_for_if_that_is_wanted(store: Store) -> None:
    foreign(store)
    told: list[str] = []
    signs = [lambda: foreign(store, beat=2), lambda: foreign(store, beat=3), lambda: store.remove(LEASE)]
    time = Seconds(*signs)
    lease = acquire(store, wait=told.append, sleep=time)
    assert time.passed == 3
    assert told == [f"{store.root}: a run on far (process 1) is making the same; waiting for it"]
    lease.release()


def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(store: Store) -> None:
    script = f"from pipeline.model.lease import *; acquire(Store({store.root!r})); import os; os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 9
    assert store.exists(LEASE)
    time = Seconds()
    acquire(store, sleep=time).release()
    assert time.passed == 0


def test_what_a_replaced_run_still_sends_is_refused(store: Store) -> None:
    first = acquire(store)
    foreign(store)
    with pytest.raises(LeaseLost, match=r"a run on far \(process 1\) has taken over; this one is stopped"):
        first.ticket.require()
    first.release()
    assert store.read_json(LEASE)["owner"] == "another", "and it does not touch what is no longer its own"


def test_a_node_that_does_not_see_the_directory_says_so(store: Store) -> None:
    lease = acquire(store)
    store.remove(LEASE)
    with pytest.raises(RunError, match="not seen by node"):
        lease.ticket.require()
    lease.release()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lease_that_nobody_can_read_holds_nothing_up(store: Store, content: str) -> None:
    store.write(LEASE, [content.encode()])
    time = Seconds()
    acquire(store, sleep=time).release()
    assert time.passed == 0
