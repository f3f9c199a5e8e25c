"""The weight files of a source against hashes that are known: from a file, or from the Hub that published them.

Each file is read once from end to end. The digests of its tensors that are taken on the way go with the tensors, so that what a
worker reads later is held against them, too.
"""

from itertools import chain

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.integrity.digests import (
    FileDigests,
    match_file_names,
    parse_sha256sums,
    require_digest_of_each,
    require_file_digest,
)
from pipeline.checkpoints.integrity.source_digests import SourceDigests, digests_of_source, with_verified_digests
from pipeline.checkpoints.sources.hub import published_hashes
from pipeline.engine.stage import Pools, Stage, run_stage
from pipeline.engine.task import Task, TaskResult
from pipeline.errors import ConfigError
from pipeline.planning.cost_model import WORKER_BASE
from pipeline.storage.store import Store
from pipeline.verification.job import HashFile

HUB = "hub"


def verified(source: Checkpoint, hashes: str, pools: Pools) -> Checkpoint:
    """The same checkpoint, of which every tensor is held against what was verified whenever it is read.

    Args:
        hashes: "hub", or a file as `sha256sum` writes it.

    Raises:
        ConfigError: no hash of one of the weight files. CheckpointError: a file that is another one than the hash was taken of.
    """
    if source.dequantized:
        raise ConfigError("verify_source reads safetensors files; check a GGUF file by `sha256sum`")
    root = source.store.root
    files: dict[str, dict[str, TensorInfo]] = {}
    for info in chain.from_iterable(info.stored for info in (*source.tensors.values(), *source.buffers)):
        files.setdefault(info.file, {})[info.name] = info
    known = (
        published_hashes(root) if hashes == HUB else match_file_names(parse_sha256sums(_text_of(hashes), hashes), files)
    )
    require_digest_of_each(known, files, hashes)
    found: dict[str, tuple[str, ...]] = {}

    def note(done: TaskResult[FileDigests]) -> None:
        digests = done.value
        require_file_digest(root, done.task.key, digests.sha256, known[done.task.key])
        found.update(digests.tensors)

    tasks = [
        Task(file, HashFile(source.store, file, tuple(own.values())), file, weight=source.store.size(file))
        for file, own in sorted(files.items())
    ]
    run_stage(pools, Stage("verify source", WORKER_BASE, unit="files"), tasks, note)
    return with_verified_digests(source, found)


def verified_digests(source: Checkpoint, hashes: str, pools: Pools) -> SourceDigests | None:
    """Digests of the source for those who open it themselves; raises as `verified`."""
    return digests_of_source(verified(source, hashes, pools))


def _text_of(name: str) -> str:
    place = Store.at(name)
    try:
        return place.parent.read(place.name).decode()
    except OSError as error:
        raise ConfigError(
            f"verify_source {name}: {error.strerror}; give {HUB}, or a file as sha256sum writes it"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"verify_source {name}: not a text; give a file as sha256sum writes it") from None
