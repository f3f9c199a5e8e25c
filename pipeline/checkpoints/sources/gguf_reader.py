"""Reads GGUF files through transformers and llama.cpp's package: the header, and the model with dequantized weights."""

from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.checkpoints.sources.gguf_bounds import require_bounded_header
from pipeline.errors import CheckpointError, ConfigError, SwscError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# End of a message about a file that lacks weights.
INCOMPLETE = (
    "the model is incomplete, or of a kind that transformers cannot read from GGUF; merge a model of several files"
    " (llama-gguf-split --merge), or give another file"
)
_MAGIC = b"GGUF"
# A model with more than this many times the file's weights is not built. With fewer missing weights it is built, and
# they are named.
_MAX_WEIGHTS_RATIO = 2
# Tensor types that are not quantized.
_UNQUANTIZED_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufOrigin:
    """The GGUF file that a checkpoint was converted from.

    Attributes:
        file: name of the file.
        baseline: quantization type of the file ("Q4_K_M"), or the types of its tensors; "" if no tensor is quantized.
        licence: licence in the header; "" if there is none.
        types: type ("Q4_1", "F32", …) -> number of tensors.
    """

    file: str
    baseline: str
    licence: str
    types: dict[str, int]

    def __str__(self) -> str:
        return f"{self.file} ({self.baseline})" if self.baseline else self.file


def require_gguf(file: Path) -> None:
    """Raise CheckpointError if the file is not a GGUF file, or its header is invalid."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a GGUF file")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{file}: not a GGUF file; download it again, or give another file")
    translate_errors(file, lambda: require_bounded_header(file))


def read_gguf_header(file: Path) -> tuple[GgufOrigin, int]:
    """Return the description of a file, and its number of weights.

    Raises:
        CheckpointError: the file is not a GGUF file, or is damaged.
        ConfigError: the package gguf is not installed.
    """
    require_gguf(file)
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError:
        raise ConfigError(
            "the package gguf, which reads GGUF files, is not installed; pip install 'swsc[demo]'"
        ) from None
    reader = translate_errors(file, lambda: GGUFReader(file))
    types = dict(Counter(tensor.tensor_type.name for tensor in reader.tensors))
    kind, licence = translate_errors(
        file, lambda: [_value(reader, f"general.{key}") for key in ("file_type", "license")]
    )
    type_names = {file_type.value: file_type.name.removeprefix("MOSTLY_") for file_type in LlamaFileType}
    type_name = type_names.get(kind, "") if isinstance(kind, int) else ""  # a damaged header may hold a list
    quantized = sorted(types.keys() - set(_UNQUANTIZED_TYPES))
    baseline = (type_name or ", ".join(quantized)) if quantized else ""
    return GgufOrigin(file.name, baseline, one_line(licence or ""), types), sum(
        int(tensor.n_elements) for tensor in reader.tensors
    )


def model_without_weights(file: Path) -> Any:
    """Build the model that the header describes, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(**pretrained_arguments(file))
    auto_class: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=torch.bfloat16)


def saved_tensors(model: Any) -> dict[str, "Tensor"]:
    """Return the tensors as `save_pretrained` writes them: tied tensors once, fused tensors split into their pieces."""
    from transformers.core_model_loading import revert_weight_conversion

    untied = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return dict(revert_weight_conversion(model, untied))


def _require_weights(file: Path, weights: int) -> None:
    """Raise CheckpointError if the model has far more weights than the file: transformers would initialize them."""
    tensors = translate_errors(file, lambda: saved_tensors(model_without_weights(file)))
    expected = sum(tensor.numel() for tensor in tensors.values())
    if expected > _MAX_WEIGHTS_RATIO * weights:
        raise CheckpointError(f"{file}: {weights:,} weights, but {expected:,} by the header: {INCOMPLETE}")


def load_gguf(file: Path, dtype: str, weights: int) -> tuple[Any, Any]:
    """Load a file with `weights` weights, dequantized to `dtype`.

    Returns:
        Model and tokenizer of transformers, which can be saved.

    Raises:
        CheckpointError: transformers cannot read the file, or the file lacks weights of the model that its header
            describes.
    """
    import torch
    from transformers import AutoTokenizer

    _require_weights(file, weights)
    loaded = _load_all_weights(file, dtype)
    # The loaded model counts as quantized by GGUF and refuses to be saved, so a plain model takes over its weights.
    with torch.device("meta"):
        plain: Any = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.to(getattr(torch, dtype))  # also the modules that transformers keeps in float32
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain, translate_errors(file, lambda: AutoTokenizer.from_pretrained(**pretrained_arguments(file)))


def _load_all_weights(file: Path, dtype: str) -> Any:
    """Load the model.

    Raises:
        CheckpointError: a weight is missing or has another shape; transformers would initialize it at random.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto_class: Any = AutoModelForCausalLM
    load: Callable[[], Any] = partial(
        auto_class.from_pretrained,
        **pretrained_arguments(file),
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    with redirect_stderr(StringIO()):  # hides the progress bar of the converter
        model, info = translate_errors(file, load)
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    mismatched = sorted((name, list(stored), list(expected)) for name, stored, expected in info["mismatched_keys"])
    problems += [f"{name} has the shape {stored}, expected {expected}" for name, stored, expected in mismatched]
    if problems:
        raise CheckpointError(f"{file}: {problems[0]} ({len(problems)} tensors in all): {INCOMPLETE}")
    return model


def translate_errors(file: Path, call: Callable[[], T]) -> T:
    """Return the result of a library's call that reads `file`.

    Translate its errors into a CheckpointError of one line.
    """
    try:
        return call()
    except SwscError:
        raise
    except Exception as error:  # the libraries have no common base class for errors about damaged files
        raise CheckpointError(f"{file}: cannot be read as GGUF ({first_line(error)}); give another file") from None


def silence_transformers() -> None:
    """Disable progress bars and warnings of transformers for the rest of this process."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def pretrained_arguments(file: Path) -> dict[str, str]:
    """Return the arguments of `from_pretrained` that name a GGUF file."""
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def one_line(value: object) -> str:
    """Return a value of a header as one printable line for a model card; "" if it is not printable."""
    text = " ".join(str(value).split())
    return text if text.isprintable() else ""
