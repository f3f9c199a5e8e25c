"""Models by their Hub id: what is read of them is downloaded into the Hub's own cache, one revision as a whole.

On a cluster all nodes must see that cache: HF_HOME on a filesystem that they share, or the model in an object store.
"""

import os
import re
from functools import lru_cache

from pipeline.errors import CheckpointError

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
_SNAPSHOT = re.compile(
    r"/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/[^/]+$"
)  # where the cache has a model
_WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "*.md",
)  # nothing that could be run


def local_copy(location: str) -> str:
    """`location` itself, or the directory that holds the Hub's model ORG/NAME[@REVISION].

    Raises:
        CheckpointError: neither a directory nor a model that can be had.
    """
    match = _HUB_ID.fullmatch(location)
    if match is None or os.path.exists(location):
        return location
    return _downloaded(match["repo"], match["revision"])


def is_hub_id(value: object) -> bool:
    """Whether it is ORG/NAME; a relative path of two parts looks the same."""
    match = _HUB_ID.fullmatch(value) if isinstance(value, str) else None
    return match is not None and match["revision"] is None


def hub_id_of(root: str) -> str | None:
    """ORG/NAME of the model that lies in the directory `root` of the Hub's cache; None for any other directory."""
    match = _SNAPSHOT.search(root)
    return f"{match['owner']}/{match['name']}" if match else None


@lru_cache
def _downloaded(repo: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(repo, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # no common root for "offline", "not found", "refused" and what a network may do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{repo}: no such directory, and not to be had from the Hub ({reason}); check the path or the id, or run"
            f" `hf download {repo}` where there is a network"
        ) from None
