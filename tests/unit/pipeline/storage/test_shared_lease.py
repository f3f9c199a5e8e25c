"""A directory of a cache that runs share goes with the last that uses it."""

import json
import threading
from pathlib import Path

import pytest

from pipeline.storage import lease
from pipeline.storage.shared_lease import remove_if_unleased, shared_lease
from pipeline.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A directory in a cache, with a file in it."""
    store = Store.at(str(tmp_path / "cache" / "variant-1"))
    store.write("file", [b"bytes"])
    return store


def test_what_nobody_uses_is_removed_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with shared_lease(store):
        pass
    assert remove_if_unleased(store)
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_two_removes_it(store: Store, tmp_path: Path) -> None:
    with shared_lease(store):
        with shared_lease(store):
            assert not remove_if_unleased(store)
        assert not remove_if_unleased(store)
        assert store.exists("file")
    assert remove_if_unleased(store)
    assert list(tmp_path.iterdir()) == []


def test_a_use_of_another_directory_keeps_nothing(store: Store) -> None:
    with shared_lease(store.parent.below("variant-2")):
        assert remove_if_unleased(store)
        assert not store.is_there


def test_it_may_be_used_before_it_is_there(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path / "cache" / "variant-1"))
    with shared_lease(store):
        store.write("file", [b"bytes"])
        assert not remove_if_unleased(store)


def test_a_process_that_was_killed_uses_nothing(store: Store, tmp_path: Path) -> None:
    with shared_lease(store):
        (own,) = (tmp_path / "cache" / "uses" / "variant-1").iterdir()
        about = json.loads((own / lease.LEASE_FILE).read_text())
        dead = own.with_name("dead") / lease.LEASE_FILE
        dead.parent.mkdir(parents=True)
        dead.write_text(json.dumps(about | {"owner": "dead", "pid": 2**22 + 1}))  # above what Linux gives out
    assert remove_if_unleased(store)
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_end_at_the_same_time_one_removes_it(store: Store, tmp_path: Path) -> None:
    together, seen = threading.Barrier(4), []

    def run() -> None:
        with shared_lease(store):
            together.wait()
            seen.append(store.exists("file"))
            together.wait()
        remove_if_unleased(store)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4
    assert list(tmp_path.iterdir()) == []


def test_folders_of_uses_go_under_the_lock_alone(store: Store) -> None:
    """Another run that holds it may be making its own in there."""
    begun, over = threading.Event(), threading.Event()

    def run() -> None:
        with shared_lease(store):
            begun.set()
            over.wait()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    with store.parent.locked():
        over.set()
        thread.join(0.3)
        assert store.parent.below("uses").is_there
    thread.join()
    assert not store.parent.below("uses").is_there
