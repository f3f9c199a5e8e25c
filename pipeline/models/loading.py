"""Loading a model into transformers from exactly the files that belong to it, with dense weights in aligned memory."""

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
    """From where and how a model is loaded for evaluation.

    Attributes:
        location: directory, object store or Hub id.
        dtype: "auto", or torch's name.
        batch_size: windows of a batch.
        trusted: code that the model brings may be run.
        known: digests of a verified model, with which all bytes that are read are compared.
    """

    location: str
    dtype: str
    batch_size: int
    trusted: bool = False
    known: SourceDigests | None = None


def forward(model: Any, ids: Tensor, **model_args: Any) -> Any:
    """Run a causal LM of transformers on token ids.

    Args:
        model: the model.
        ids: int64 [batch, length].
        model_args: arguments of the model's forward method. The KV cache is off unless they contain use_cache.

    Raises:
        TextError: there are more tokens than positions, or tokens outside the vocabulary.
    """
    try:
        return model(input_ids=ids, **{"use_cache": False, **model_args})
    except IndexError as error:
        # Raised by the lookup in an embedding on a CPU.
        positions, vocabulary = max_positions(model.config.to_dict()), model.get_input_embeddings().weight.shape[0]
        raise TextError(
            f"the input exceeds the model's {positions} positions or {vocabulary} tokens ({error}); use shorter"
            " windows, or the model's own tokenizer"
        ) from None


def load_model(source: Model, key: ModelKey, device: str, digests: RangeDigests | None = None) -> Any:
    """Load a causal LM of transformers with dense weights in aligned memory, in eval mode.

    Args:
        source: the stored model.
        key: dtype and trust.
        device: torch's name of the device.
        digests: filled with the digests of all tensors that are stored dense, if given.

    Raises:
        CheckpointError: the model cannot be loaded completely.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    with loading_errors(key.location):
        model, info = _load(source, key, device, digests)
    missing = sorted(info["missing_keys"])
    # transformers only warns, and fills missing weights with random numbers.
    if missing:
        raise CheckpointError(
            f"{key.location}: the files lack {len(missing)} weights of the {type(model).__name__} in config.json, first"
            f" {missing[0]}; provide all files of the model, or repair config.json"
        )
    model = model.to(device).eval()
    # The alignment of tensors in a file depends on its header; with equal alignment, equal weights give equal losses.
    align(model)
    return model


def meta_model(key: ModelKey) -> Any:
    """Return the same model on torch's meta device, with its class, config and shapes but without weights."""
    with loading_errors(key.location):
        return load_meta_model(key.location, key.trusted).model


def arithmetic_dtype(source: Model, key: ModelKey, config: Any, device: str) -> str:
    """Return torch's name of the dtype that a model computes in; "auto" is float32 on a CPU and its own on a GPU."""
    if key.dtype != "auto":
        return key.dtype
    return "float32" if device == "cpu" else _own_dtype(source, config)


def _own_dtype(source: Model, config: Any) -> str:
    """The dtype of the computation: that of the config, or else that of the first floating-point weight."""
    for part in (config, config.get_text_config()):
        if getattr(part, "dtype", None):
            return str(part.dtype).removeprefix("torch.")
    return DTYPES[next((dtype for dtype in map(source.dtype, source.names) if dtype in FLOAT_DTYPES), "F32")][0]


def _load(source: Model, key: ModelKey, device: str, digests: RangeDigests | None) -> Any:
    """Load exactly the weights of `source`. From a directory, transformers would choose files and apply adapters."""
    # The class of the model is needed, because from_pretrained of the Auto class requires files.
    empty, config = load_meta_model(key.location, key.trusted)
    dtype = arithmetic_dtype(source, key, config, device)
    with _weights(source, digests) as weights:
        model, info = type(empty).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    model.generation_config = empty.generation_config
    return model, info


class _CheckedSlice:
    """Like a slice of safetensors, but the tensor is compared with its digest when it is read, on indexing."""

    def __init__(self, store: Store, info: TensorInfo, digests: RangeDigests | None) -> None:
        self._store, self._info, self._digests = store, info, digests

    def __getitem__(self, index: Any) -> Tensor:
        return read_tensor(self._store, self._info, self._digests)[index]

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.dtype


@contextmanager
def _weights(source: Model, digests: RangeDigests | None) -> Iterator[dict[str, object]]:
    """Name -> tensor, or an object that maps the tensor into memory on indexing, which avoids copies of dense files."""
    checkpoint = source.checkpoint
    mappable = checkpoint.store.is_local and not source.entries
    with ExitStack() as files:
        mapped = _MappedFiles(checkpoint.store.root, files)
        weights: dict[str, object] = {info.name: read_tensor(checkpoint.store, info) for info in checkpoint.buffers}
        for name in source.names:
            info = checkpoint.tensors.get(name)
            if info is None or source.is_compressed(name):
                weights[name] = source.read(name)
            elif not mappable or info.fp8 is not None:
                weights[name] = read_tensor(checkpoint.store, info, digests)
            elif info.sha256 or digests is not None:
                weights[name] = _CheckedSlice(checkpoint.store, info, digests)
            else:
                weights[name] = mapped.slice(info)
        yield weights


class _MappedFiles:
    """Opens each safetensors file of a directory once."""

    def __init__(self, root: str, stack: ExitStack) -> None:
        self._root, self._stack = root, stack
        self._files: dict[str, safe_open] = {}

    def slice(self, info: TensorInfo) -> object:
        """Return a tensor as a slice, which is mapped into memory when it is indexed."""
        if info.file not in self._files:
            path = f"{self._root}/{info.file}"
            self._files[info.file] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[info.file].get_slice(info.name)
