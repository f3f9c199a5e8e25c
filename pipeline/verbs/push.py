"""The verb push: a finished output in, a commit on the Hugging Face Hub out."""

from dataclasses import dataclass, field

from pipeline import VERSION
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.sources.hub import PushTarget, require_pushable
from pipeline.checkpoints.sources.hub import push as upload
from pipeline.engine.stage import Pools
from pipeline.errors import OutputError
from pipeline.outputs.atomic_edit import complete_interrupted_edit
from pipeline.outputs.owned_files import REPORT
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.push import PushSettings
from pipeline.storage.store import Store
from pipeline.verification.flow import manifest_of, verify_output


@dataclass(frozen=True)
class PushRequest:
    """An upload of the output at `output` to the repository `repo`, ORG/NAME."""

    output: str
    repo: str
    settings: PushSettings = field(default_factory=PushSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)


@dataclass(frozen=True)
class PushResult:
    """Address of the commit."""

    commit: str


def push(request: PushRequest) -> PushResult:
    """Verify an output and upload it; raises as `push_output`."""
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    with worker_pools(request.cluster) as pools:
        return PushResult(push_output(request.output, request.repo, request.settings, pools))


def push_output(location: str, repo: str, settings: PushSettings, pools: Pools) -> str:
    """Verify the output at `location`, then upload the files of its manifest, the manifest and the report.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: `repo` is not an id, nobody is logged in, or the Hub's offline mode is on.
        OutputError: the output is not on a local disk, or one of its files is a link.
        CheckpointError: there is no finished output.
        DamageError: a file differs from the manifest.
        StoreError: the Hub refuses the upload, or is not reachable.
    """
    require_pushable(repo)
    store = Store.at(location)
    if not store.is_local:
        raise OutputError(
            f"{location}: only outputs on a local disk can be pushed; copy it into a local directory first"
        )
    complete_interrupted_edit(store)  # completes an interrupted edit of the card, which the manifest must match
    verify_output(location, pools)
    names = [*manifest_of(store)["files"], MANIFEST, REPORT]
    if link := next((name for name in names if store.is_link(name)), None):
        raise OutputError(f"{location}: {link} is a link; push a copy with the files themselves (cp -rL)")
    message = settings.message or f"Output of swsc {VERSION}"
    return upload(store.root, names, PushTarget(repo, settings.private, settings.revision), message, MANIFEST)
