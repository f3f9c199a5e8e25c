"""Reading sharded and single-file safetensors checkpoints: names, shapes and byte ranges from the headers alone.

A header is parsed by `swsc_core.storage.safetensors_header`, which says why the safetensors library does not do that.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

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
from pipeline.checkpoints.redundant_tensors import Tie, find_copies, is_buffer, untied_config
from pipeline.checkpoints.sources.gguf import read_gguf_origin
from pipeline.checkpoints.sources.gguf_reader import GgufOrigin
from pipeline.checkpoints.weight_files import INDEX, JSON_LIMIT, SINGLE, IgnoredFile, weight_files
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store
from swsc_core.storage import safetensors_header

WEIGHTS_KEY = "transformers_weights"
MANIFEST = "swsc_manifest.json"  # of an output: written last
RUN = ".swsc/run.json"  # of an output under way: what was asked for


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers and configuration; no weights.

    Attributes:
        tensors: by name, in the order of shards and of offsets within them.
        extras: other files of the directory and of folders in it that belong to the model (tokenizer, chat templates, code, …).
        headers_sha256: over the headers of all files.
        buffers: tensors of the files that are no weights: masks and the like, which every model makes anew.
        scales: of fp8 weights, which stand in `tensors` as what they are with them: bfloat16.
        dequantized: the GGUF file that it was made of, or that what it was compressed from was made of.
        passed_over: files beside the model's that hold weights, or belong to an adapter, and are not read.
        copies: tied tensors that are stored twice, of which `tensors` holds one.
        untied: tensors that the class ties and that hold values of their own: as in transformers they stay two.
        verified: its files were held against known hashes, and its tensors have their digests.
    """

    store: Store
    tensors: dict[str, TensorInfo]
    config: ModelConfig
    extras: tuple[str, ...] = field(default=())
    headers_sha256: str = ""
    buffers: tuple[TensorInfo, ...] = ()
    scales: tuple[TensorInfo, ...] = ()
    dequantized: GgufOrigin | None = None
    passed_over: tuple[IgnoredFile, ...] = ()
    left_out: tuple[IgnoredFile, ...] = ()
    copies: tuple[Tie, ...] = ()
    untied: tuple[Tie, ...] = ()
    verified: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Tells this checkpoint from another one (fingerprint.py); read when it is asked for, which workers never do."""
        return fingerprint_of(self)

    @property
    def files(self) -> set[str]:
        """Files that its tensors are read from; none if they lie nowhere yet (gguf_headers.py)."""
        return {info.file for info in self.tensors.values() if info.start}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def weights(self) -> int:
        return sum(info.count for info in self.tensors.values())


def read_checkpoint(location: str) -> Checkpoint:
    """Read the headers of the checkpoint in the directory `location`, on a disk or in an object store.

    Nothing is downloaded or converted; `source.open_checkpoint` does that first.

    Raises:
        CheckpointError: no checkpoint there, a shard missing, truncated or corrupt, an index that names an absent file or
            one outside the directory, a tensor in two shards, or a pickle checkpoint.
    """
    store = Store.at(location)
    entries = store.entries()
    for name in sorted({SINGLE, INDEX, "config.json"} & entries.keys()):
        require_readable(store, name)
    names = sorted(name for name, is_file in entries.items() if is_file)
    if not names:
        what = "a file" if store.parent.exists(store.name) else "no such directory, or an empty one"
        raise CheckpointError(f"{location}: {what}; give the directory of a checkpoint")
    if store.exists(RUN) and not store.exists(MANIFEST):
        raise CheckpointError(f"{location}: an unfinished output; run the command that began it again")
    config = _config(store) if "config.json" in names else {}
    files, weight_map, passed_over = weight_files(store, names, config.get(WEIGHTS_KEY))
    # The key names a file of the source, which an output does not have.
    config = {key: value for key, value in config.items() if key != WEIGHTS_KEY}
    for name in (*files, "config.json"):
        require_link_inside(store, name)
    extras = find_extra_files(store, {*files, *dict(passed_over)})
    tensors, headers_sha256 = _headers(location, store, files)
    _check_index(location, weight_map, tensors)
    if MANIFEST in names:
        tensors = with_digests(tensors, _recorded(store))
    if "config.json" not in names:
        raise CheckpointError(f"{store.root}: config.json is missing; download it too")
    buffers = tuple(info for info in tensors.values() if is_buffer(info))
    copies = find_copies(store, tensors, config)
    twice = {tie.name for tie in copies.equal}
    own = {name: info for name, info in tensors.items() if not is_buffer(info) and name not in twice}
    if copies.different:
        config = untied_config(config)
    own, config, scales = read_as_bfloat16(location, own, config)
    note = read_gguf_origin(store)
    left_out = (*passed_over, *extras.left_out)
    passed_over += tuple(one for one in extras.left_out if one.name == f"{ADAPTER_FOLDER}/")
    return Checkpoint(
        store, own, config, extras.copied, headers_sha256, buffers, scales, note, passed_over, left_out, *copies
    )


def _headers(location: str, store: Store, files: Iterable[str]) -> tuple[dict[str, TensorInfo], str]:
    """Every tensor of the files, and the sha256 over their headers; CheckpointError for a tensor that stands in two of them."""
    tensors: dict[str, TensorInfo] = {}
    digest = hashlib.sha256()
    for file in files:
        header, infos = read_header(store, file)
        digest.update(header)
        for info in infos:
            if info.name in tensors:
                raise CheckpointError(
                    f"{location}: {info.name} stands in {tensors[info.name].file} and in {file}; keep one"
                )
            tensors[info.name] = info
    return tensors, digest.hexdigest()


def _recorded(store: Store) -> dict[str, tuple[str, ...]]:
    """Digests that an output keeps of its tensors."""
    try:
        return manifest_digests(store.read_json(MANIFEST))
    except ValueError as error:
        raise CheckpointError(
            f"{store.root}: {MANIFEST} is damaged ({error}); make the output again by --overwrite"
        ) from None


def _check_index(location: str, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{location}: the index puts {name} into {file}, which does not hold it; download both again"
            )


def read_header(store: Store, file: str) -> tuple[bytes, list[TensorInfo]]:
    """Header bytes and tensors of one safetensors file, in order of offset; CheckpointError if it is damaged."""
    where, size = f"{store.root}/{file}", store.size(file)
    try:
        raw, entries = safetensors_header.read_header(lambda start, count: bytes(store.read(file, start, count)), size)
    except ValueError as error:
        require_no_lfs_pointer(where, bytes(store.read(file, 0, min(len(LFS_POINTER), size))))
        raise CheckpointError(f"{where}: {error}; download it again") from None
    return raw, [_info(where, file, entry) for entry in entries]


def _info(where: str, file: str, entry: safetensors_header.HeaderEntry) -> TensorInfo:
    if entry.dtype not in safetensors_header.BITS:
        raise CheckpointError(
            f"{where}: {entry.name} has the dtype {entry.dtype!r}, which is not part of the safetensors format as this"
            " release knows it; install a newer release of swsc, or save the tensor in a known dtype"
        )
    return TensorInfo(entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes)


def _config(store: Store) -> ModelConfig:
    try:
        config = store.read_json("config.json", JSON_LIMIT)
    except ValueError as error:
        raise CheckpointError(f"{store.root}/config.json: not JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{store.root}/config.json: wanted an object, got {type(config).__name__}")
    for key in ("quantization_config", TEXT_CONFIG):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{store.root}/config.json: {key} is no object; download it again")
    _require_names(store, config)
    require_buildable(f"{store.root}/config.json", config)
    return config


def _require_names(store: Store, config: ModelConfig) -> None:
    """Raise CheckpointError for a model type or a quantization method that is not a string."""
    inner = text_part(config)
    methods = config.get("quantization_config"), config.get("compression_config"), inner.get("quantization_config")
    said = [(config, "model_type"), (inner, "model_type"), *((method, "quant_method") for method in methods)]
    for about, key in said:
        if isinstance(about, dict) and not isinstance(about.get(key), str | None):
            raise CheckpointError(f"{store.root}/config.json: {key} is no text; download it again")
