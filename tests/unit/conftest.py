"""Unit tests start no Ray and wait for nothing: both fail here instead of slowing everybody down."""

import time

import pytest
import ray


@pytest.fixture(autouse=True)
def no_ray_no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a unit test starts no Ray and does not sleep")

    monkeypatch.setattr(ray, "init", forbidden)
    monkeypatch.setattr(time, "sleep", forbidden)
