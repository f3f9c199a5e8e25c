"""No power fails during these tests: they need not wait for the disk at each of some fifty files of a run."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """tests/unit/pipeline/storage/test_local_files.py claims what is synchronized, and in which order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
