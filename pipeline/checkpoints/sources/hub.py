"""Downloads models from the Hub and pushes outputs to it.

A model is downloaded into the Hub's own cache, one revision as a whole, custom code included, which runs only on
request. On a cluster all nodes must see the cache: set HF_HOME to a shared file system, or keep the model in an object
store. Pushing uses the login of the Hub's client; a token is neither accepted as a flag nor printed.
"""

import glob
import os
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.checkpoints.extra_files import HUB_IGNORED_PATTERNS, HUB_PATTERNS, is_weights
from pipeline.errors import CheckpointError, ConfigError, StoreError, first_line

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
# Directory of a model in the cache.
_SNAPSHOT = re.compile(r"/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/[^/]+$")


@dataclass(frozen=True)
class PushTarget:
    """The repository that an output is pushed to.

    Attributes:
        repo: ORG/NAME.
        private: create the repository as a private one, and refuse a public one.
        revision: branch, which is created if it does not exist; None: the default branch.
    """

    repo: str
    private: bool = False
    revision: str | None = None


def download(location: str) -> str | None:
    """Return the directory of the model ORG/NAME[@REVISION] in the Hub's cache, after downloading it if it is absent.

    Returns None if `location` exists on this machine or is not the id of a model.

    Raises:
        CheckpointError: the Hub does not have the model, or cannot be reached.
    """
    match = _HUB_ID.fullmatch(location)
    if match is None or os.path.exists(location):
        return None
    return _downloaded(match["repo"], match["revision"])


def is_hub_id(value: object) -> bool:
    """Whether a value has the form ORG/NAME. A relative path of two parts has it too."""
    match = _HUB_ID.fullmatch(value) if isinstance(value, str) else None
    return match is not None and match["revision"] is None


def hub_id_of(root: str) -> str | None:
    """Return ORG/NAME of the model in the directory `root` of the Hub's cache; None for any other directory."""
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
    except Exception as error:  # errors of the client and of the network have no common base class
        reason = first_line(error)
        raise CheckpointError(
            f"{repo}: no such directory, and the download from the Hub failed ({reason}); check the path or the id, or"
            f" run `hf download {repo}` on a machine with network access"
        ) from None


def published_hashes(root: str) -> dict[str, str]:
    """Return file -> sha256 as published by the Hub for the revision in the directory `root` of its cache.

    Raises:
        ConfigError: `root` is not in the Hub's cache.
        StoreError: the Hub cannot be reached.
    """
    repo = hub_id_of(root)
    if repo is None:
        raise ConfigError(f"{root}: not a model of the Hub; give its id ORG/NAME, or a file of sha256 to verify it")
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(repo, recursive=True, revision=os.path.basename(root)))
    except Exception as error:  # no common base class, as above
        reason = first_line(error)
        raise StoreError(
            f"{repo}: cannot get the published hashes from the Hub ({reason}); check the network, or give a file of"
            " sha256"
        ) from None
    return {entry.path: entry.lfs.sha256 for entry in entries if isinstance(entry, RepoFile) and entry.lfs}


def require_pushable(repo: str) -> None:
    """Raise ConfigError if a push to `repo` cannot succeed: not ORG/NAME, offline mode, or no login."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not is_hub_id(repo):
        raise ConfigError(f"{repo}: not the id of a model on the Hub; give ORG/NAME")
    if HF_HUB_OFFLINE:
        raise ConfigError(f"{repo}: cannot push while HF_HUB_OFFLINE is set; unset it")
    token = get_token()
    if token is None:
        raise ConfigError(f"{repo}: not logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable()):  # an error of the client would quote it
        raise ConfigError(f"{repo}: the token of the Hub has invalid characters; run `hf auth login` again")


def push(folder: str, names: Iterable[str], target: PushTarget, message: str, marker: str) -> str:
    """Upload the files `names` of `folder`, creating the repository if it does not exist.

    Files that the Hub has already are not sent again. Tensor files of an earlier output are removed; other files stay.

    Args:
        message: commit message.
        marker: name of a file by which a repository is recognized as an output.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: the target is private and the repository is public, or the repository holds another model.
        StoreError: the Hub refuses the request, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api = HfApi()
        _prepare_repository(api, target, marker)
        commit = api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            revision=target.revision,
            commit_message=message,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=["*.safetensors"],
        )
    except ConfigError:
        raise
    except Exception as error:  # no common base class, as above
        reason = first_line(error).replace(get_token() or "\0", "…")
        raise StoreError(
            f"{target.repo}: not pushed ({reason}); check the network and the token's write permission, then push again"
        ) from None
    return str(commit.commit_url)


def _prepare_repository(api: Any, target: PushTarget, marker: str) -> None:
    """Create the repository and the branch; ConfigError if they hold what must not be replaced."""
    repo, revision = target.repo, target.revision
    api.create_repo(repo, private=target.private or None, exist_ok=True)
    if target.private and not api.model_info(repo).private:
        raise ConfigError(
            f"{repo}: the repository exists and is public; make it private on the Hub, or choose another id"
        )
    if not (revision and _create_branch(api, repo, revision)):
        _require_replaceable(repo, api.list_repo_files(repo, revision=revision), marker)


def _create_branch(api: Any, repo: str, branch: str) -> bool:
    """Create a branch unless it exists; returns whether it was created. The files of the default branch stay there."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_branch(repo, branch=branch)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


def _require_replaceable(repo: str, names: Collection[str], marker: str) -> None:
    """Raise ConfigError for a model that is not an output: a push would remove its weights, config and card."""
    if marker not in names and any(map(is_weights, names)):
        raise ConfigError(
            f"{repo}: the repository holds a model that is not an output of this tool and would be replaced; choose"
            " another id, or push to a new branch by --revision"
        )
