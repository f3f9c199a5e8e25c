"""The model cache of a worker, and the conversion of errors."""

import errno
import weakref

import pytest

from pipeline.engine.task import JobContext, JobOutput, ModelCache, Task, TaskResult, as_swsc_error
from pipeline.errors import CheckpointError, DiskFull, RunError, StoreError, SwscError


def test_a_model_is_loaded_again_only_for_another_key_loader_or_after_it_was_dropped() -> None:
    loads: list[str] = []

    def load(key: str, device: str) -> str:
        loads.append(key)
        return f"{key} on {device}"

    cache = ModelCache()
    assert cache.get(load, "a", "cpu") == "a on cpu"
    assert cache.get(load, "a", "cpu") == "a on cpu"
    cache.get(load, "b", "cpu")
    cache.get(lambda key, device: key, "b", "cpu")
    assert loads == ["a", "b"]
    cache.clear()
    cache.get(load, "b", "cpu")
    assert loads == ["a", "b", "b"]


class Referenced:
    """A model whose modules reference each other."""

    def __init__(self, *_arguments: str) -> None:
        self.itself = self


def test_the_memory_of_a_model_is_free_before_another_one_is_loaded() -> None:
    cache = ModelCache()
    first = weakref.ref(cache.get(Referenced, "a", "cpu"))
    cache.get(lambda key, device: "loaded" if first() is None else pytest.fail("both are in memory"), "b", "cpu")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (CheckpointError("w holds NaN"), CheckpointError, "w holds NaN"),
        (StoreError("503"), StoreError, "layer 3: 503"),
        (OSError(errno.ENOSPC, "no space", "/disk"), DiskFull, "/disk"),
        (KeyError("x"), RunError, "layer 3: KeyError"),
    ],
)
def test_an_error_of_a_job_keeps_its_class_or_names_the_task(
    error: Exception, kind: type[SwscError], message: str
) -> None:
    converted = as_swsc_error(error, "layer 3")
    assert type(converted) is kind
    assert message in str(converted)


def test_the_value_of_a_failed_task_is_its_error() -> None:
    class Work:
        def run(self, context: JobContext) -> JobOutput[None]:
            raise NotImplementedError

    with pytest.raises(RunError, match="no luck"):
        _ = TaskResult(Task("a", Work()), error=RunError("no luck")).value
