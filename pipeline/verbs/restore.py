"""The verb restore: a compressed model in, a plain dense checkpoint out, optionally with a LoRA adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.restoring.flow import RestoreOptions, restore_model
from pipeline.settings.cluster import ClusterSettings
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths
from pipeline.verification.flow import verify_output


@dataclass(frozen=True)
class RestoreRequest:
    """A restoration of the compressed model at `model` to the directory `dense`.

    Attributes:
        verify: compare the compressed model with its manifest first.
    """

    model: str
    dense: str
    options: RestoreOptions = field(default_factory=RestoreOptions)
    verify: bool = False
    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def require_valid(self) -> None:
        """Raise OutputError if the dense checkpoint would change the compressed one."""
        require_disjoint_paths(UserPath.at("DENSE", self.dense), user_paths([("OUTPUT", self.model)]))


@dataclass(frozen=True)
class RestoreResult:
    """The report of a restoration, as swsc_report.json has it."""

    request: RestoreRequest
    report: Mapping[str, object]

    @property
    def rows(self) -> list[Mapping[str, object]]:
        """The rows of the report, one per tensor."""
        rows = self.report["tensors"]
        assert isinstance(rows, list)  # by the format of the report
        return rows


def restore(request: RestoreRequest) -> RestoreResult:
    """Restore a model; raises as `restore_model` and `verify_output`."""
    request.require_valid()
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    with worker_pools(request.cluster) as pools:
        if request.verify:
            verify_output(request.model, pools)
        return RestoreResult(request, restore_model(request.model, request.dense, pools, request.options))
