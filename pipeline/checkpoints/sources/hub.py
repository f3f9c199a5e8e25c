"""The Hub: models by their id, and outputs that are pushed to it.

What is read is downloaded into the Hub's own cache, one revision as a whole: code that the model brings, too, which is run only
where that is asked for. On a cluster all nodes must see that cache: HF_HOME on a filesystem that they share, or the model in an
object store. Who pushes is known by the Hub's own login alone: a token is neither taken by a flag nor printed.
"""

import glob
import os
import re
import sys
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

from pipeline.checkpoints.extra_files import HUB_IGNORED_PATTERNS, HUB_PATTERNS, is_weights
from pipeline.errors import CheckpointError, ConfigError, StoreError, first_line

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
_SNAPSHOT = re.compile(
    r"/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/[^/]+$"
)  # where the cache has a model


def download(location: str) -> str | None:
    """The directory of the Hub's cache with the model ORG/NAME[@REVISION], downloaded first if it is absent.

    None if `location` exists on this machine or is not the id of a model.

    Raises:
        CheckpointError: the Hub does not have the model, or cannot be reached.
    """
    match = _HUB_ID.fullmatch(location)
    if match is None or os.path.exists(location):
        return None
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
        return str(
            snapshot_download(
                repo, revision=revision, allow_patterns=[*HUB_PATTERNS], ignore_patterns=[*HUB_IGNORED_PATTERNS]
            )
        )
    except Exception as error:  # no common root for "offline", "not found", "refused" and what a network may do
        reason = first_line(error)
        raise CheckpointError(
            f"{repo}: no such directory, and not to be had from the Hub ({reason}); check the path or the id, or run"
            f" `hf download {repo}` where there is a network"
        ) from None


def published_hashes(root: str) -> dict[str, str]:
    """File -> sha256, as the Hub publishes it for the revision that lies in the directory `root` of its cache.

    Raises:
        ConfigError: `root` is no such directory. StoreError: the Hub does not tell.
    """
    repo = hub_id_of(root)
    if repo is None:
        raise ConfigError(f"{root}: not a model of the Hub; give a file of sha256 to verify it, or its id ORG/NAME")
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(repo, recursive=True, revision=os.path.basename(root)))
    except Exception as error:  # no common root, as above
        reason = first_line(error)
        raise StoreError(
            f"{repo}: the Hub does not tell its hashes ({reason}); run it where there is a network, or give a file of sha256"
        ) from None
    return {entry.path: entry.lfs.sha256 for entry in entries if isinstance(entry, RepoFile) and entry.lfs}


def require_pushable(repo: str) -> None:
    """Raise ConfigError if nothing can be pushed to `repo`: no ORG/NAME, offline mode, or nobody logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not is_hub_id(repo):
        raise ConfigError(f"{repo}: not the id of a model on the Hub; give ORG/NAME")
    if HF_HUB_OFFLINE:
        raise ConfigError(f"{repo}: nothing is pushed while HF_HUB_OFFLINE is set; unset it where there is a network")
    token = get_token()
    if token is None:
        raise ConfigError(f"{repo}: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable()):  # the client would quote it when it complains
        raise ConfigError(f"{repo}: the Hub's token holds characters that no token has; run `hf auth login` again")


def push(
    folder: str, names: Iterable[str], repo: str, private: bool, revision: str | None, message: str, own: str
) -> str:  # fmt: skip
    """Make `repo`, if it is not there, the files `names` of `folder`, and return the address of the commit.

    Files that the Hub has already are not sent again. Tensor files there of an earlier output are removed; others stay.

    Args:
        own: name of the file by which an output of ours is known.

    Raises:
        ConfigError: `private` was asked for, and the repository is there and public; or it holds a model that is not ours.
        StoreError: the Hub refuses, or is not reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(f"{repo}: is there, and public; make it private on the Hub, or choose another id")
        if not (revision and _is_new_branch(api, repo, revision)):
            _require_replaceable(repo, api.list_repo_files(repo, revision=revision), own)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message,
            allow_patterns=[glob.escape(name) for name in names], delete_patterns=["*.safetensors"],
        )  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # no common root for what the Hub refuses and what a network may do
        reason = first_line(error).replace(get_token() or "\0", "…")
        raise StoreError(
            f"{repo}: not pushed ({reason}); check the network and that the token may write there, then push again"
        ) from None
    return str(done.commit_url)


def _is_new_branch(api: Any, repo: str, branch: str) -> bool:
    """Make a branch, unless it is there; what it begins with stays where it was branched from."""
    from huggingface_hub.utils import HfHubHTTPError

    try:
        api.create_branch(repo, branch=branch)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


def _require_replaceable(repo: str, there: Collection[str], own: str) -> None:
    """Raise ConfigError for a model that somebody else has put there: its weights would be removed, or lose their config and card."""
    if own not in there and any(map(is_weights, there)):
        raise ConfigError(
            f"{repo}: holds a model that is not an output of this tool and would be replaced; choose another id, or push it to a"
            " new branch by --revision"
        )
