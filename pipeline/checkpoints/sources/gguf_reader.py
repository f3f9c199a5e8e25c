"""What transformers and llama.cpp's own package read of a GGUF file: its header, and a model with the weights that it stands for."""

from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from pipeline.checkpoints.sources.gguf_bounds import require_bounded_header
from pipeline.errors import CheckpointError, ConfigError, SwscError, first_line

INCOMPLETE = (
    "not a whole model, or of a kind that transformers cannot read from GGUF; of a model in several files make one"
    " (llama-gguf-split --merge), or give another"
)
_MAGIC = b"GGUF"
_SLACK = 2  # a model with more weights than so many times the file's is not made; one that lacks a few is, and they are named
_WHOLE = ("F64", "F32", "F16", "BF16")  # types that are not quantized


@dataclass(frozen=True)
class GgufOrigin:
    """What a checkpoint was made of.

    Attributes:
        file: name of the GGUF file.
        baseline: its type, "Q4_K_M", or the types of its tensors; "" if nothing in it is quantized.
        licence: what it says of that; "" if nothing.
        types: number of its tensors of each type ("Q4_1", "F32", …).
    """

    file: str
    baseline: str
    licence: str
    types: dict[str, int]

    def __str__(self) -> str:
        return f"{self.file} ({self.baseline})" if self.baseline else self.file


def require_gguf(file: Path) -> None:
    """Raise CheckpointError if it is no GGUF file, or one whose header does not fit it."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a GGUF file")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{file}: not a GGUF file; download it again, or give another")
    translate_errors(file, lambda: require_bounded_header(file))


def read_gguf_header(file: Path) -> tuple[GgufOrigin, int]:
    """What the file holds, and its number of weights.

    Raises:
        CheckpointError: no GGUF file, or a damaged one. ConfigError: the package gguf is missing.
    """
    require_gguf(file)
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError:
        raise ConfigError("the package gguf reads GGUF files and is not installed; pip install 'swsc[demo]'") from None
    reader = translate_errors(file, lambda: GGUFReader(file))
    types = dict(Counter(tensor.tensor_type.name for tensor in reader.tensors))
    kind, licence = translate_errors(
        file, lambda: [_value(reader, f"general.{key}") for key in ("file_type", "license")]
    )
    names = {one.value: one.name.removeprefix("MOSTLY_") for one in LlamaFileType}
    named = names.get(kind, "") if isinstance(kind, int) else ""  # the header may say a list
    quantized = sorted(types.keys() - set(_WHOLE))
    baseline = (named or ", ".join(quantized)) if quantized else ""
    return GgufOrigin(file.name, baseline, one_line(licence or ""), types), sum(
        int(tensor.n_elements) for tensor in reader.tensors
    )


def model_without_weights(file: Path) -> Any:
    """The model that the header describes, on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(**pretrained_arguments(file))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def saved_tensors(model: Any) -> dict[str, Any]:
    """Name -> tensor as `save_pretrained` writes them: tied ones once, joined ones by their parts."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return dict(revert_weight_conversion(model, own))


def _require_held(file: Path, weights: int) -> None:
    """Raise CheckpointError if the header's model has far more weights than the file: transformers would make and fill them all."""
    wanted = sum(
        tensor.numel() for tensor in translate_errors(file, lambda: saved_tensors(model_without_weights(file))).values()
    )
    if wanted > _SLACK * weights:
        raise CheckpointError(f"{file}: {weights:,} weights are in it, and {wanted:,} by its header: {INCOMPLETE}")


def load_gguf(file: Path, dtype: str, weights: int) -> tuple[Any, Any]:
    """Model and tokenizer of a file that holds so many weights.

    Raises:
        CheckpointError: transformers cannot read it, or the model that its header describes has other weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _require_held(file, weights)

    how: dict[str, Any] = {
        **pretrained_arguments(file),
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    with redirect_stderr(StringIO()):  # the converter's bar, which knows nothing of terminals
        loaded, info = translate_errors(file, lambda: AutoModelForCausalLM.from_pretrained(**how))
    lacking = [f"{name} is not in it" for name in sorted(info["missing_keys"])]
    differing = sorted((name, list(there), list(wanted)) for name, there, wanted in info["mismatched_keys"])
    lacking += [f"{name} is {there} in it, and {wanted} by its header" for name, there, wanted in differing]
    if lacking:  # transformers would draw them at random
        raise CheckpointError(f"{file}: {lacking[0]} ({len(lacking)} tensors in all): {INCOMPLETE}")
    # The loaded model counts as quantized by GGUF and refuses to be saved: one without weights takes its weights.
    with torch.device("meta"):
        plain: Any = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.to(getattr(torch, dtype))  # what transformers would keep in float32, too
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain, translate_errors(file, lambda: AutoTokenizer.from_pretrained(**pretrained_arguments(file)))


def translate_errors(file: Path, call: Callable[[], Any]) -> Any:
    """What a library makes of the file, or one line on why it does not."""
    try:
        return call()
    except SwscError:
        raise
    except Exception as error:  # no common root for what a damaged or foreign file brings up
        raise CheckpointError(f"{file}: cannot be read as GGUF ({first_line(error)}); give another file") from None


def silence_transformers() -> None:
    """No bars and no advice of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def pretrained_arguments(file: Path) -> dict[str, str]:
    """How transformers is told of a GGUF file."""
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def one_line(value: object) -> str:
    """What a file says of itself, in one line that a card may hold."""
    text = " ".join(str(value).split())
    return text if text.isprintable() else ""
