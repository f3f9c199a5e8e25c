"""Checkpoints of safetensors files: names, shapes and byte ranges of their tensors, from the headers alone.

`swsc_core.storage.safetensors_header` parses a header, and explains why the safetensors library does not.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from pipeline.architectures.config_bounds import require_buildable
from pipeline.architectures.model_config import TEXT_CONFIG, ModelConfig, text_part
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.extra_files import (
    ADAPTER_FOLDER,
    LFS_POINTER,
    find_extra_files,
    require_link_inside,
    require_no_lfs_pointer,
    require_readable,
)
from pipeline.checkpoints.fp8_source import read_as_bfloat16
from pipeline.checkpoints.integrity.digests import manifest_digests, with_digests
from pipeline.checkpoints.integrity.fingerprint import fingerprint_of
from pipeline.checkpoints.redundant_tensors import Copies, Tie, find_copies, is_buffer, untied_config
from pipeline.checkpoints.sources.gguf import read_gguf_origin
from pipeline.checkpoints.sources.gguf_reader import GgufOrigin
from pipeline.checkpoints.weight_files import CONFIG_LIMIT, INDEX, SINGLE, IgnoredFile, WeightFiles, weight_files
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store
from swsc_core.storage import safetensors_header

# Key of config.json that names the file of weights, or its index.
WEIGHTS_KEY = "transformers_weights"
# Manifest of an output, which is written last.
MANIFEST = "swsc_manifest.json"
# Description of an output that is not finished: the settings of its run.
RUN = ".swsc/run.json"


@dataclass(frozen=True)
class Checkpoint:
    """Headers and configuration of a checkpoint, without weights.

    Attributes:
        tensors: by name, in the order of files and of offsets within them. Redundant tensors are not among them.
        extras: names of other files that belong to the model: tokenizer, chat templates, code, …
        headers_sha256: digest of the headers of all files.
        buffers: stored tensors that are not weights, such as causal masks; the model computes them.
        scales: scales of fp8 weights. `tensors` has these weights in bfloat16.
        dequantized: the GGUF file that the checkpoint, or the source of the output, was converted from.
        ignored_weights: files of weights and adapters beside the model that are not read.
        ignored_files: all files that are neither read nor copied.
        copies: tied tensors that are stored twice with equal values; `tensors` has one of them.
        untied: tensors that the model's class ties and that have different values. As in transformers both are weights.
        verified: the files were compared with known digests, and `tensors` have theirs.
    """

    store: Store
    tensors: dict[str, TensorInfo]
    config: ModelConfig
    extras: tuple[str, ...] = field(default=())
    headers_sha256: str = ""
    buffers: tuple[TensorInfo, ...] = ()
    scales: tuple[TensorInfo, ...] = ()
    dequantized: GgufOrigin | None = None
    ignored_weights: tuple[IgnoredFile, ...] = ()
    ignored_files: tuple[IgnoredFile, ...] = ()
    copies: tuple[Tie, ...] = ()
    untied: tuple[Tie, ...] = ()
    verified: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the checkpoint (`fingerprint.py`). Reads samples of the weights on first access."""
        return fingerprint_of(self)

    @property
    def files(self) -> set[str]:
        """Files that hold the tensors; empty if the weights are not stored yet (`gguf_headers.py`)."""
        return {info.file for info in self.tensors.values() if info.start}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def weights(self) -> int:
        """Number of all weights."""
        return sum(info.count for info in self.tensors.values())


def read_checkpoint(location: str) -> Checkpoint:
    """Read the headers of the checkpoint in the directory `location`, on a disk or in an object store.

    Nothing is downloaded or converted; `source.open_checkpoint` does that first.

    Raises:
        CheckpointError: there is no checkpoint; it is a pickle; a shard is missing, truncated or corrupt; the index
            names an absent file or one outside the directory; two shards hold the same tensor.
    """
    store = Store.at(location)
    names = _file_names(store, location)
    config = _read_config(store) if "config.json" in names else {}
    weights = weight_files(store, names, config.get(WEIGHTS_KEY))
    for name in (*weights.files, "config.json"):
        require_link_inside(store, name)
    extras = find_extra_files(store, {*weights.files, *dict(weights.ignored)})
    stored, headers_sha256 = _read_headers(store, weights)
    if "config.json" not in names:
        raise CheckpointError(f"{store.root}: config.json is missing; download it too")
    contents = _find_weights(store, stored, config)
    adapters = tuple(file for file in extras.ignored if file.name == f"{ADAPTER_FOLDER}/")
    return Checkpoint(
        store,
        contents.tensors,
        contents.config,
        extras.copied,
        headers_sha256,
        contents.buffers,
        contents.scales,
        read_gguf_origin(store),
        ignored_weights=(*weights.ignored, *adapters),
        ignored_files=(*weights.ignored, *extras.ignored),
        copies=contents.copies.equal,
        untied=contents.copies.different,
    )


class _Contents(NamedTuple):
    """The stored tensors by their use, and the config of a model that has `tensors` only."""

    tensors: dict[str, TensorInfo]
    config: ModelConfig
    buffers: tuple[TensorInfo, ...]
    scales: tuple[TensorInfo, ...]
    copies: Copies


def _file_names(store: Store, location: str) -> list[str]:
    """Return the sorted names of the files in the directory.

    Raises:
        CheckpointError: the directory is empty, has an unreadable file, or holds an unfinished output.
    """
    entries = store.entries()
    for name in sorted({SINGLE, INDEX, "config.json"} & entries.keys()):
        require_readable(store, name)
    names = sorted(name for name, is_file in entries.items() if is_file)
    if not names:
        problem = "a file" if store.parent.exists(store.name) else "no such directory, or an empty one"
        raise CheckpointError(f"{location}: {problem}; give the directory of a checkpoint")
    if store.exists(RUN) and not store.exists(MANIFEST):
        raise CheckpointError(f"{location}: the output is not finished; run the command that started it again")
    return names


def _find_weights(store: Store, stored: Mapping[str, TensorInfo], config: ModelConfig) -> _Contents:
    """Separate weights from buffers, copies of tied tensors and scales of fp8 weights."""
    buffers = tuple(info for info in stored.values() if is_buffer(info))
    copies = find_copies(store, stored, config)
    copied_names = {tie.name for tie in copies.equal}
    tensors = {name: info for name, info in stored.items() if not is_buffer(info) and name not in copied_names}
    # The key names a file of the source, which an output does not have.
    config = {key: value for key, value in config.items() if key != WEIGHTS_KEY}
    if copies.different:
        config = untied_config(config)
    tensors, config, scales = read_as_bfloat16(store.root, tensors, config)
    return _Contents(tensors, config, buffers, scales, copies)


def _read_headers(store: Store, weights: WeightFiles) -> tuple[dict[str, TensorInfo], str]:
    """Read the headers of all files.

    Returns:
        Every stored tensor by its name, with its known digest if the checkpoint is an output, and the sha256 of the
        headers.

    Raises:
        CheckpointError: a damaged header, a tensor in two files, or an index that contradicts the headers.
    """
    tensors: dict[str, TensorInfo] = {}
    digest = hashlib.sha256()
    for file in weights.files:
        header, infos = read_header(store, file)
        digest.update(header)
        for info in infos:
            if info.name in tensors:
                raise CheckpointError(
                    f"{store.root}: {info.name} is stored in {tensors[info.name].file} and in {file}; keep one"
                )
            tensors[info.name] = info
    _require_index_matches(store, weights.weight_map, tensors)
    return with_digests(tensors, _read_manifest_digests(store)), digest.hexdigest()


def _read_manifest_digests(store: Store) -> dict[str, tuple[str, ...]]:
    """Return the digests of tensors in the manifest of an output; empty for other checkpoints."""
    if not store.exists(MANIFEST):
        return {}
    try:
        return manifest_digests(store.read_json(MANIFEST))
    except ValueError as error:
        raise CheckpointError(
            f"{store.root}: {MANIFEST} is damaged ({error}); make the output again by --overwrite"
        ) from None


def _require_index_matches(store: Store, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{store.root}: by the index {file} holds {name}, but it does not; download both again"
            )


def read_header(store: Store, file: str) -> tuple[bytes, list[TensorInfo]]:
    """Return the header bytes and the tensors of a safetensors file, ordered by offset.

    Raises:
        CheckpointError: the file is damaged, or has a tensor of an unknown dtype.
    """
    path, size = f"{store.root}/{file}", store.size(file)
    try:
        raw, entries = safetensors_header.read_header(lambda start, count: bytes(store.read(file, start, count)), size)
    except ValueError as error:
        require_no_lfs_pointer(path, bytes(store.read(file, 0, min(len(LFS_POINTER), size))))
        raise CheckpointError(f"{path}: {error}; download it again") from None
    return raw, [_to_info(path, file, entry) for entry in entries]


def _to_info(path: str, file: str, entry: safetensors_header.HeaderEntry) -> TensorInfo:
    if entry.dtype not in safetensors_header.BITS:
        raise CheckpointError(
            f"{path}: {entry.name} has the dtype {entry.dtype!r}, which this release does not know; install a newer"
            " release of swsc, or save the tensor in a known dtype"
        )
    return TensorInfo(entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes)


def _read_config(store: Store) -> ModelConfig:
    """Read and validate config.json; CheckpointError if it is damaged or describes an impossible model."""
    path = f"{store.root}/config.json"
    try:
        config = store.read_json("config.json", CONFIG_LIMIT)
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}; download it again")
    for key in ("quantization_config", TEXT_CONFIG):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{path}: {key} is not an object; download it again")
    _require_names(path, config)
    require_buildable(path, config)
    return config


def _require_names(path: str, config: ModelConfig) -> None:
    """Raise CheckpointError if a model type or a quantization method is not a string."""
    text = text_part(config)
    methods = config.get("quantization_config"), config.get("compression_config"), text.get("quantization_config")
    for part, key in [(config, "model_type"), (text, "model_type"), *((method, "quant_method") for method in methods)]:
        if isinstance(part, dict) and not isinstance(part.get(key), str | None):
            raise CheckpointError(f"{path}: {key} is not a string; download it again")
