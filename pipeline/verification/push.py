"""A finished output to the Hub: verified first, then exactly what its manifest lists, the manifest and the report."""

from pipeline import VERSION
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.sources.hub import push, require_pushable
from pipeline.engine.stage import Pools
from pipeline.errors import OutputError
from pipeline.outputs.atomic_edit import settle
from pipeline.outputs.owned_files import REPORT
from pipeline.settings.push import PushSettings
from pipeline.storage.store import Store
from pipeline.verification.flow import manifest_of, verify_output


def push_output(location: str, repo: str, settings: PushSettings, pools: Pools) -> str:
    """Push the output at `location`; returns the address of the commit.

    Raises:
        ConfigError: `repo` is no id, nobody is logged in, or the Hub's offline mode is on.
        OutputError: not a directory on a disk. CheckpointError: no finished output. DamageError: not as it was written.
        StoreError: the Hub refuses, or is not reached.
    """
    require_pushable(repo)
    store = Store.at(location)
    if not store.is_local:
        raise OutputError(f"{location}: pushed from a disk only; copy it into a local directory first")
    settle(store)  # a card and a manifest that belong together
    verify_output(location, pools)
    names = [*manifest_of(store)["files"], MANIFEST, REPORT]
    if found := next((name for name in names if store.is_link(name)), None):
        raise OutputError(f"{location}: {found} is a link; push a copy with the files themselves (cp -rL)")
    message = settings.message or f"Output of swsc {VERSION}"
    return push(store.root, names, repo, settings.private, settings.revision, message, MANIFEST)
