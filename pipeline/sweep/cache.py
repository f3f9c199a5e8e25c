"""What a sweep keeps in its cache: second moments, which stay, and models of tuned rows, which go once they are measured."""

from collections.abc import Sequence

from pipeline.outputs.preflight import STAGED
from pipeline.planning.cost_model import hessian_bytes
from pipeline.settings.sweep import SweepSettings
from pipeline.storage.shared_lease import remove_if_unleased
from pipeline.storage.store import Store, require_free_space
from pipeline.sweep.runs import Run
from pipeline.variants.calibrate_and_allocate import cache_of
from pipeline.variants.compress_and_tune import VARIANT


def require_cache_room(runs: Sequence[Run], settings: SweepSettings, beside: str) -> None:
    """Raise OutputError if the cache's disk has no room for all that the sweep keeps there at once.

    That is every tuned model, the one among them that is made at the time once more before it is tuned, and the second moments.
    What an earlier sweep has left is taken for a part of it.
    """
    cache = Store.at(cache_of(settings, beside))
    tuned = [run.plan.stored_bytes_as("swsc") for run in runs if run.plan and run.variant and run.variant.epochs]
    require_free_space(cache, max(0, sum(tuned) + max(tuned, default=0) + _moments(runs) - _there(cache)))


def _moments(runs: Sequence[Run]) -> int:
    """Bytes of second moments: runs of one model share those of the same matrices."""
    infos = {
        (run.model, decision.matrix.name): decision.matrix
        for run in runs
        if run.plan and run.variant and run.variant.needs_hessians
        for decision in run.plan.compressed
    }
    models = {model for model, _ in infos}
    return sum(hessian_bytes(info for (owner, _), info in infos.items() if owner == model) for model in models)


def _there(cache: Store) -> int:
    kinds = (STAGED, VARIANT, "moments")
    places = [cache.below(name) for name, is_file in cache.entries().items() if not is_file and name.startswith(kinds)]
    return sum(place.size(name) for place in places for name in place.names())


def shares_its_stages(run: Run, later: Sequence[Run]) -> bool:
    """Whether another run is still to be tuned from the same compressed model."""
    return any(other.model == run.model and _base(other) == _base(run) for other in later)


def _base(run: Run) -> object:
    if run.variant is None or not run.variant.epochs:
        return None
    return run.variant.model_copy(update={"tune": 0, "name": "base", "reference": {}})


def forget_measured(runs: Sequence[Run]) -> None:
    """Remove the models of tuned rows that were measured; one that failed stays, and the next sweep finds it.

    So does one that another sweep is still to measure, which removes it then.
    """
    for run in runs:
        if run.made and not run.error:
            remove_if_unleased(run.made.checkpoint.store)
