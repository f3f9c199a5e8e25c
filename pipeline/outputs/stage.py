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
    pools: Pools, stage: Stage, tasks: list[Task[V]], on_result: Callable[[TaskResult[V]], None], output: Output
) -> None:
    """Run the tasks that write an output.

    The output is abandoned if a weight turns out to be uncompressible, or if the cluster cannot run the tasks and no
    file is finished. With finished files it is kept, because the failure may come from a node that was added late.
    """
    try:
        run_stage(pools, stage, tasks, on_result)
    except UncompressibleWeight:
        abandon(output)
        raise
    except ClusterError:
        if not output.store.below(FINISHED_FOLDER).names():
            abandon(output)
        raise
