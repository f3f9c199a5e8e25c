"""The cache of a sweep: Hessians, which stay, and tuned models, which are removed after their evaluation."""

from collections.abc import Sequence

from pipeline.outputs.preflight import UNTUNED_PREFIX
from pipeline.planning.memory import hessian_bytes
from pipeline.storage.shared_lease import remove_if_unleased
from pipeline.storage.store import Store, require_free_space
from pipeline.sweep.runs import Run
from pipeline.variants.compress_and_tune import VARIANT


def require_cache_room(runs: Sequence[Run], cache: str) -> None:
    """Raise OutputError if the cache's disk has no room for what the sweep keeps there at the same time.

    This is every tuned model, one untuned model, and the Hessians. Directories of an earlier sweep count as a part of
    it.
    """
    store = Store.at(cache)
    tuned = [run.plan.stored_bytes_as("swsc") for run in runs if run.plan and run.variant and run.variant.epochs]
    needed = sum(tuned) + max(tuned, default=0) + _hessian_bytes(runs)
    require_free_space(store, max(0, needed - _existing_bytes(store)))


def shares_untuned_model(run: Run, later_runs: Sequence[Run]) -> bool:
    """Whether a later run will be tuned from the same untuned model."""
    return any(later.model == run.model and _untuned(later) == _untuned(run) for later in later_runs)


def remove_evaluated(runs: Sequence[Run]) -> None:
    """Remove the models of tuned variants that were evaluated.

    The model of a run that failed stays for the next sweep, and a model that another sweep uses is removed by that
    sweep.
    """
    for run in runs:
        if run.tuned and not run.measurement.error:
            remove_if_unleased(run.tuned.checkpoint.store)


def _hessian_bytes(runs: Sequence[Run]) -> int:
    """Bytes of the Hessians of all matrices; runs of one model share them."""
    matrices = {
        (run.model, decision.matrix.name): decision.matrix
        for run in runs
        if run.plan and run.variant and run.variant.needs_hessians
        for decision in run.plan.compressed
    }
    models = {model for model, _ in matrices}
    return sum(hessian_bytes(info for (owner, _), info in matrices.items() if owner == model) for model in models)


def _existing_bytes(cache: Store) -> int:
    prefixes = (UNTUNED_PREFIX, VARIANT, "moments")
    folders = [name for name, is_file in cache.entries().items() if not is_file and name.startswith(prefixes)]
    return sum(cache.below(folder).size(name) for folder in folders for name in cache.below(folder).names())


def _untuned(run: Run) -> object:
    """What the untuned model of a tuned run depends on; None for a run without tuning."""
    if run.variant is None or not run.variant.epochs:
        return None
    return run.variant.model_copy(update={"tune": 0, "name": "untuned", "reference": {}})
