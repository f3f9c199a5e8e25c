"""Verification of a source: its weight files are compared with sha256 hashes from a file, or from the Hub.

Each file is read once. The digests of its tensors, which are computed on the way, stay with the tensors, so that every
later read by a worker is compared with them.
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
from pipeline.planning.memory import WORKER_BASE
from pipeline.storage.store import Store
from pipeline.verification.job import HashFile

HUB = "hub"


def verified(source: Checkpoint, hashes: str, pools: Pools) -> Checkpoint:
    """The same checkpoint with digests that every later read is compared with.

    Args:
        hashes: "hub", or the location of a file in the format of `sha256sum`.

    Raises:
        ConfigError: the hash of a weight file is not given.
        CheckpointError: a file has another hash.
    """
    if source.dequantized:
        raise ConfigError("verify_source: only safetensors files can be verified; check a GGUF file with `sha256sum`")
    root = source.store.root
    files: dict[str, dict[str, TensorInfo]] = {}
    for info in chain.from_iterable(info.stored for info in (*source.tensors.values(), *source.buffers)):
        files.setdefault(info.file, {})[info.name] = info
    expected = (
        published_hashes(root)
        if hashes == HUB
        else match_file_names(parse_sha256sums(_read_text(hashes), hashes), files)
    )
    require_digest_of_each(expected, files, hashes)
    digests: dict[str, tuple[str, ...]] = {}

    def note(done: TaskResult[FileDigests]) -> None:
        require_file_digest(root, done.task.key, done.value.sha256, expected[done.task.key])
        digests.update(done.value.tensors)

    tasks = [
        Task(file, HashFile(source.store, file, tuple(tensors.values())), file, work=size, nbytes=size)
        for file, tensors in sorted(files.items())
        for size in [source.store.size(file)]
    ]
    run_stage(pools, Stage("verify source", WORKER_BASE, unit="files", on_cpu=True), tasks, note)
    return with_verified_digests(source, digests)


def verified_digests(source: Checkpoint, hashes: str, pools: Pools) -> SourceDigests | None:
    """Digests of a source, for jobs that open the source themselves; raises as `verified`."""
    return digests_of_source(verified(source, hashes, pools))


def _read_text(location: str) -> str:
    file = Store.at(location)
    try:
        return file.parent.read(file.name).decode()
    except OSError as error:
        raise ConfigError(
            f"verify_source {location}: {error.strerror}; give {HUB}, or a file as sha256sum writes it"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"verify_source {location}: not a text; give a file as sha256sum writes it") from None
