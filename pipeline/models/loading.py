"""A model of transformers from the files that the project decided are the model, with dense weights in aligned memory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipeline.architectures.model_config import max_positions
from pipeline.architectures.tensor_info import FLOAT_DTYPES, TensorInfo
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.integrity.source_digests import SourceDigests
from pipeline.checkpoints.tensor_io import read_tensor
from pipeline.errors import CheckpointError, TextError
from pipeline.models.meta_loading import load_meta_model, loading_errors
from pipeline.models.stored_model import Model
from pipeline.storage.store import Store
from swsc_core import align
from swsc_core.storage.safetensors_header import DTYPES


@dataclass(frozen=True)
class ModelKey:
    """What an evaluation model is loaded from and as.

    Attributes:
        dtype: "auto", or torch's name.
        trusted: code that the model brings may be run.
        known: digests of a model that was verified, which all that is read of it is held against.
    """

    location: str
    dtype: str
    batch_size: int
    trusted: bool = False
    known: SourceDigests | None = None


def forward(model: Any, ids: Tensor, **how: Any) -> Any:
    """What a causal LM of transformers makes of token ids, int64 [batch, length]; nothing is kept for a next call unless told.

    Raises:
        TextError: more tokens than the model has positions for, or others than it knows.
    """
    try:
        return model(input_ids=ids, **{"use_cache": False, **how})
    except IndexError as error:  # of a table of embeddings, on a CPU
        positions, known = max_positions(model.config.to_dict()), model.get_input_embeddings().weight.shape[0]
        raise TextError(
            f"the model was made for {positions} positions and {known} tokens, its input has others ({error}): make windows"
            " shorter, or give the model its own tokenizer"
        ) from None


def load_model(source: Model, key: ModelKey, device: str, digests: RangeDigests | None = None) -> Any:
    """A transformers causal LM with dense weights in aligned memory, in eval mode; CheckpointError if it cannot be loaded whole.

    `digests` get those of what was read, of tensors that are stored dense.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = key.dtype if key.dtype != "auto" else ("float32" if device == "cpu" else "auto")
    with loading_errors(key.location):
        model, info = _load(source, key, dtype, digests)
    absent = sorted(info["missing_keys"])
    if absent:  # transformers only warns, and fills them with random numbers
        raise CheckpointError(
            f"{key.location}: the files lack {len(absent)} weights of the {type(model).__name__} that config.json describes,"
            f" {absent[0]} first; give all files of the model, or repair config.json"
        )
    model = model.to(device).eval()
    align(model)  # equal weights give equal losses, wherever the header of a file leaves them
    return model


def meta_model(key: ModelKey) -> Any:
    """The same model on torch's meta device: its class, config and shapes, and not a byte of weights."""
    with loading_errors(key.location):
        return load_meta_model(key.location, key.trusted).model


def _own_dtype(source: Model, config: Any) -> str:
    """What the model calculates in: as its config says, or the dtype of its first weight."""
    for about in (config, config.get_text_config()):
        if getattr(about, "dtype", None):
            return str(about.dtype).removeprefix("torch.")
    return DTYPES[next((dtype for dtype in map(source.dtype, source.names) if dtype in FLOAT_DTYPES), "F32")][0]


def _load(source: Model, key: ModelKey, dtype: str, digests: RangeDigests | None) -> Any:
    """The weights of `source`, those and no others: given a directory, transformers would choose files and apply adapters itself."""
    empty, config = load_meta_model(key.location, key.trusted)  # from_pretrained of the Auto class insists on files
    if dtype == "auto":
        dtype = _own_dtype(source, config)
    with _weights(source, digests) as weights:
        model, info = type(empty).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    model.generation_config = empty.generation_config
    return model, info


class _Checked:
    """A tensor that is read, and held against its digest, once it is indexed; as a slice of safetensors, which knows no digests."""

    def __init__(self, store: Store, info: TensorInfo, digests: RangeDigests | None) -> None:
        self._store, self._info, self._digests = store, info, digests

    def __getitem__(self, index: Any) -> Tensor:
        return read_tensor(self._store, self._info, self._digests)[index]

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.dtype


@contextmanager
def _weights(source: Model, digests: RangeDigests | None) -> Iterator[dict[str, Any]]:
    """Name -> weight, or what maps it into memory when it is indexed: dense files on a disk are not copied."""
    checkpoint, files = source.checkpoint, {}
    in_place = checkpoint.store.is_local and not source.entries
    with ExitStack() as opened:
        weights: dict[str, Any] = {info.name: read_tensor(checkpoint.store, info) for info in checkpoint.buffers}
        for name in source.names:
            info = checkpoint.tensors.get(name)
            if info is None or source.is_compressed(name):
                weights[name] = source.read(name)
                continue
            if not in_place or info.fp8 is not None:
                weights[name] = read_tensor(checkpoint.store, info, digests)
                continue
            if info.sha256 or digests is not None:
                weights[name] = _Checked(checkpoint.store, info, digests)
                continue
            if info.file not in files:
                path = f"{checkpoint.store.root}/{info.file}"
                files[info.file] = opened.enter_context(safe_open(path, framework="pt"))
            weights[name] = files[info.file].get_slice(name)
        yield weights
