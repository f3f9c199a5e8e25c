"""Many models × variants × evaluations in one driver, over one pool of workers."""

import time
from contextlib import ExitStack, closing

from pipeline.console import log_prefix
from pipeline.engine.memory import Room
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage
from pipeline.settings.sweep import SweepSettings, Variant
from pipeline.sweep.block_tasks import VariantPasses, count_passes, variant_shards
from pipeline.sweep.blocks import BlockedModel, blocked_models, peak_memory
from pipeline.sweep.cache import remove_evaluated, require_cache_room, shares_untuned_model
from pipeline.sweep.inputs import open_inputs
from pipeline.sweep.rows import Row, SweepResult, matrix_table, rows_by_matrix, run_rows
from pipeline.sweep.runs import Run, make_runs, settings_of
from pipeline.sweep.tasks import SweepTasks, count_tasks, estimated_work
from pipeline.variants.calibrate_and_allocate import calibrate_and_allocate
from pipeline.variants.compress_and_tune import remove_intermediates, tuned_variant
from pipeline.variants.compression import Compression, Compute


class Sweep:
    """A sweep: `choose_blocks`, `calibrate`, then `run`, then `result`; `close` at the end."""

    def __init__(self, settings: SweepSettings) -> None:
        """Open models and texts, and plan every variant.

        Raises:
            ConfigError: names all variants that do not fit a model.
            CheckpointError, TextError: a model or a text cannot be opened.
        """
        self._started = time.perf_counter()
        self._settings = settings
        self._inputs = open_inputs(settings)
        self._runs = make_runs(settings, self._inputs.checkpoints)
        self._tasks: SweepTasks | None = None
        self._room: Room | None = None
        self._blocked: list[BlockedModel] = []
        self._uses = ExitStack()  # keeps tuned models in the cache, which other sweeps could remove

    def calibrate(self, compute: Compute, cache: str) -> None:
        """Calibrate the variants that need it and resolve their specs; compress and tune those that are tuned.

        Args:
            cache: directory, visible to all nodes, of intermediate results.

        Raises:
            TextError: the calibration text is too short, or shares passages with an evaluation text.
        """
        require_cache_room(self._runs, cache)
        for run in self._runs:
            if run.variant is None or not run.variant.needs_calibration:
                continue
            with log_prefix(f"{self._inputs.location_of(run)}, {run.name}"):
                compression = self._calibrated(run, run.variant, cache, compute)
                if run.tuned:
                    shared = shares_untuned_model(run, self._runs[run.number + 1 :])
                    remove_intermediates(compression, compute.arithmetic, keep_untuned=shared)
            run.begin()

    def _calibrated(self, run: Run, variant: Variant, cache: str, compute: Compute) -> Compression:
        """The compression of a run with its final specs; if it is tuned, the cache has the model afterwards."""
        assert run.plan is not None  # only the uncompressed model has none
        calibration = self._settings.calibration_of(variant)
        compression = Compression(self._inputs.checkpoint_of(run), run.plan, settings_of(variant), calibration)
        compression = calibrate_and_allocate(compression, cache, compute, self._settings.evaluations)
        run.plan, run.hessians = compression.plan, compression.hessians
        if variant.epochs:
            run.tuned = tuned_variant(compression, compute, self._uses)
        return compression

    def choose_blocks(self, room: Room) -> None:
        """Decide which models are evaluated in blocks of layers; without this call, none is.

        Raises:
            ClusterError: a layer of a model does not fit.
            BlocksUnsupported: a model does not fit, and it cannot run in blocks.
        """
        self._room = room
        self._blocked = blocked_models(self._inputs, self._runs, room)

    def run(self, pools: Pools) -> None:
        """Compress and evaluate. After an error, `result` has what was measured until then."""
        if self._room and any(run.tuned for run in self._runs):
            self._blocked = blocked_models(self._inputs, self._runs, self._room)
        in_blocks = frozenset(number for blocked in self._blocked for number in blocked.runs)
        passes = sum(count_passes(blocked, self._inputs, self._runs) for blocked in self._blocked)
        total = count_tasks(self._inputs, self._runs, in_blocks) + passes
        try:
            with Progress("sweep", total, estimated_work(self._inputs, self._runs)) as progress:
                tasks = self._tasks = SweepTasks(self._inputs, self._runs, progress, in_blocks)
                self._run_stages(pools, tasks, progress)
        except BaseException:
            for state in (run.measurement for run in self._runs):
                state.error = state.error or ("not finished" if state.missing or state.outstanding else None)
            raise

    def _run_stages(self, pools: Pools, tasks: SweepTasks, progress: Progress) -> None:
        """Compressions and evaluations of whole models, then those in blocks; again if matrices were lost."""
        while tasks.waiting or any(tasks.evaluable(blocked.runs) for blocked in self._blocked):
            if tasks.waiting:
                with closing(pools(tasks.waiting, self.stage)) as pool:
                    execute(pool, tasks, progress)
            for blocked in self._blocked:
                if shards := variant_shards(blocked, tasks):
                    with closing(pools(min(len(shards), len(blocked.layout.blocks)), blocked.stage)) as pool:
                        passes = VariantPasses(blocked, shards, tasks, pool)
                        execute(pool, passes, progress)
                    passes.require_finished()

    def result(self) -> SweepResult:
        """What has been measured so far."""
        results = self._tasks.results if self._tasks else {}
        rows: list[Row] = []
        matrices: list[Row] = []
        for run in self._runs:
            rows += run_rows(run, self._inputs, rows_by_matrix(run, results))
            labels = {"model": self._inputs.location_of(run), "variant": run.name}
            matrices += [{**labels, **row} for row in matrix_table(run, results)]
        segmented = frozenset(run.name for run in self._runs if run.is_segmented)
        return SweepResult(rows, matrices, time.perf_counter() - self._started, segmented)

    def remove_evaluated(self) -> None:
        """Remove tuned models from the cache, whose results are written, unless the settings keep them."""
        self.close()
        if not self._settings.keep_tuned:
            remove_evaluated(self._runs)

    def close(self) -> None:
        """Allow other sweeps to remove the tuned models of this one."""
        self._uses.close()

    @property
    def stage(self) -> Stage:
        """The stage that compresses, and evaluates the models that fit a worker."""
        blocked = {self._runs[number].model for model in self._blocked for number in model.runs}
        whole = [number for number in range(len(self._inputs.checkpoints)) if number not in blocked]
        return Stage("sweep", peak_memory(self._inputs, self._runs, whole), keeps_model=not self._blocked)
