"""The stage of a command whose tasks write the files of an output."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import ClusterError, WeightsError
from pipeline.model.output import Output, abandon
from pipeline.model.parts import DONE
from pipeline.run.stage import PoolMaker, run_stage
from pipeline.run.task import Task, TaskResult

V = TypeVar("V")


def run_output_stage(
    tasks: list[Task[V]], memory: int, note: Callable[[TaskResult[V]], None], make_pool: PoolMaker, out: Output, what: str,
    device: int = 0,
) -> None:  # fmt: skip
    """Run tasks on a pool of their own, of workers that need `memory` bytes each, `device` of them on a GPU if they have one.

    A weight that cannot be compressed, which shows on the way only, takes the begun output back; so does a cluster that cannot do it.
    """
    try:
        run_stage(tasks, memory, note, make_pool, what, "files", device)
    except (WeightsError, ClusterError) as error:
        if isinstance(error, WeightsError) or not out.store.below(DONE).names():  # a node that joins late may not fit
            abandon(out)
        raise
