"""The stage of a command whose tasks write the files of an output."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.checkpoints.tensor_io import FINISHED_FOLDER
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import ClusterError, UncompressibleWeight
from pipeline.outputs.transaction import Output, abandon

V = TypeVar("V")


def run_output_stage(
    pools: Pools, stage: Stage, tasks: list[Task[V]], note: Callable[[TaskResult[V]], None], out: Output
) -> None:
    """Run the tasks that write an output.

    A weight that cannot be compressed, which shows on the way only, takes the begun output back; so does a cluster that cannot do it.
    """
    try:
        run_stage(pools, stage, tasks, note)
    except (UncompressibleWeight, ClusterError) as error:
        if (
            isinstance(error, UncompressibleWeight) or not out.store.below(FINISHED_FOLDER).names()
        ):  # a node that joins late may not fit
            abandon(out)
        raise
