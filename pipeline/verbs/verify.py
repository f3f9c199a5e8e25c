"""The verb verify: a finished output in, the number of its files and bytes out, all of which match the manifest."""

from dataclasses import dataclass, field

from pipeline.settings.cluster import ClusterSettings
from pipeline.verification.flow import VerifiedOutput, verify_output


@dataclass(frozen=True)
class VerifyRequest:
    """A check of the output at `output`."""

    output: str
    cluster: ClusterSettings = field(default_factory=ClusterSettings)


def verify(request: VerifyRequest) -> VerifiedOutput:
    """Compare every file of an output with its manifest; raises as `verify_output`."""
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    with worker_pools(request.cluster) as pools:
        return verify_output(request.output, pools)
