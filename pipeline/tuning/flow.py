"""Tuning flow: moves the stored values of a compressed model so that its predictions approach those of the original.

Compression treats each matrix as if all others were uncompressed; tuning optimises them together. Labels do not change,
and neither does the size of any stored tensor. Some windows are held out, and a tuning that does not reduce the
divergence on them is not applied.
"""

from typing import cast

from pipeline.checkpoints.checkpoint import MANIFEST, Checkpoint
from pipeline.checkpoints.integrity.source_digests import digests_of_source
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, file_differences
from pipeline.console import log
from pipeline.device import Arithmetic
from pipeline.engine.memory import Room
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import execute
from pipeline.engine.stage import Pools, Stage, log_and_release
from pipeline.errors import OutputError, PayloadLost
from pipeline.models.stored_model import Model
from pipeline.outputs.stage import check_on
from pipeline.outputs.transaction import Output, OutputRequest, begin
from pipeline.planning.memory import tuning_memory
from pipeline.settings.calibration import CalibrationSettings
from pipeline.storage import records
from pipeline.storage.cache_key import cache_name, digest_of, versioned, windows_identity
from pipeline.storage.records import read_cached, read_record, report_damaged_cache
from pipeline.storage.shared_lease import remove_if_unleased
from pipeline.storage.store import Store
from pipeline.tuning.blocks_flow import BlockPasses, BlockTuning, teacher_files
from pipeline.tuning.passes import Passes, WholeModelPasses
from pipeline.tuning.steps import TuningReport, TuningSteps, state_file, state_files
from pipeline.tuning.tuner import TunedValues, TuneKey
from pipeline.tuning.windows import TuningWindows

# Starts of a tuning whose state is lost with its node.
_MAX_STARTS = 3
_RESULT = "result.json"


class Tuning:
    """One tuning of one compressed model. `store` is the directory that caches its result for later runs."""

    def __init__(
        self,
        source: Checkpoint,
        compressed: str,
        windows: TuningWindows,
        settings: CalibrationSettings,
        cache: str,
        arithmetic: Arithmetic,
    ) -> None:
        """A tuning that `run` begins or resumes.

        Args:
            compressed: location of the finished, compressed model.
            cache: directory that all nodes see.
            arithmetic: of the workers. Different kinds of GPU give different last bits, so each kind has its own cache
                entry.
        """
        self._source, self._windows = source, windows
        dtype = settings.calibration_dtype
        self._key = TuneKey(source.store.root, compressed, dtype, settings.trust_remote_code, digests_of_source(source))
        self.identity = versioned(
            "tuned",
            {
                "source": source.fingerprint,
                "compressed": _digest_of(compressed),
                "epochs": windows.epochs,
                "seed": windows.seed,
                "dtype": dtype,
                **windows_identity(windows.ids),
                **arithmetic.gpu_identity,
            },
        )
        self.store = Store.at(f"{cache}/{cache_name('tuned', self.identity)}")

    def run(self, pools: Pools) -> tuple[TunedValues, TuningReport]:
        """Tune, resume an interrupted tuning, or read a finished one from the cache.

        Returns the tuned values, which are those of the compressed model if tuning was not applied, and the report.

        Raises:
            RunError: a task failed; states that were written are kept.
        """
        if not self.store.exists(_RESULT):
            with report_damaged_cache(self.store):
                files = [*state_files(len(self._windows.batches())), *teacher_files(len(self._windows.ids))]
                request = OutputRequest(self.store, self.identity, files, check=check_on(pools))
                output = begin(request, log_and_release(pools))
            with output:
                if not self.store.exists(_RESULT):  # another run, which `begin` waited for, may have finished it
                    self._tune(output, pools)
        result = read_cached(self.store, _RESULT, lambda: read_record(self.store, _RESULT, records.TuningRecord))
        report = cast(TuningReport, result)
        file = self._verified_state(report["steps"]) if report["applied"] else None
        return TunedValues(self._key.compressed, self.store, file), report

    def forget(self) -> None:
        """Remove the cached result. A run that needs it later has to tune again."""
        remove_if_unleased(self.store)

    def _tune(self, output: Output, pools: Pools) -> None:
        """Tune from the last state in a file, and resume from there if the present state is lost with its node."""
        passes = self._passes(output, pools.room())
        steps = TuningSteps(self._key, passes, self._windows, output)
        for start in range(_MAX_STARTS):
            try:
                report = self._execute(steps, passes, pools)
                break
            except PayloadLost as error:
                if start == _MAX_STARTS - 1:
                    raise
                log(f"tune: {error}; resuming from step {steps.kept_step}")
        for file in {*teacher_files(len(self._windows.ids))} & {*self.store.names()}:
            self.store.remove(f"{FINISHED_FOLDER}/{file}.json")
            self.store.remove(file)
        self.store.write_json(_RESULT, report)

    def _passes(self, output: Output, room: Room) -> Passes:
        """Passes by workers that hold the whole models or, if these do not fit, blocks of them."""
        seqlen = self._windows.ids.shape[1]
        stage = Stage("tune", tuning_memory(Model(self._source, {}), seqlen, self._key.dtype))
        if room.holds(stage.memory):
            return WholeModelPasses(self._key, self._windows.ids, stage)
        return BlockPasses(BlockTuning.within(room, self._source, self._key, seqlen), self._windows.ids, output)

    def _execute(self, steps: TuningSteps, passes: Passes, pools: Pools) -> TuningReport:
        pool = pools(passes.n_workers(steps.batch_size), passes.stage)
        try:
            with Progress(passes.stage.name, steps.n_tasks, 0, unit=passes.stage.unit) as progress:
                return steps.run(pool, lambda source: execute(pool, source, progress))
        finally:
            pool.close()

    def _verified_state(self, steps: int) -> str:
        """File of the state after `steps` steps. Raises OutputError if its bytes are not those that were written."""
        file = state_file(steps)
        record = f"{FINISHED_FOLDER}/{file}.json"
        written = read_cached(self.store, record, lambda: read_record(self.store, record, records.FinishedFileRecord))
        if differing := file_differences(self.store, file, written):
            raise OutputError(f"{self.store.root}: {differing[0]}; remove this folder, and run the same command again")
        return file


def _digest_of(location: str) -> str:
    """Digest of the sha256 of all files that the manifest of a finished output lists."""
    store = Store.at(location)
    files = read_cached(store, MANIFEST, lambda: read_record(store, MANIFEST, records.ManifestRecord))["files"]
    return digest_of({name: record["sha256"] for name, record in files.items()})
