"""A GGUF file in, a plain safetensors checkpoint out: llama.cpp's blocks of few bits are dequantized.

transformers knows how the tensors of each architecture are named and permuted in GGUF, so it reads the file. What comes out
has the values that the GGUF file stands for, not those of the model that it was made from.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, ConfigError, OutputError

_MAGIC = b"GGUF"
_WHOLE = ("F64", "F32", "F16", "BF16")  # types that are not quantized


def convert_gguf(file: Path, target: Path, dtype: str = "bfloat16") -> dict[str, int]:
    """Write the model in `file`, dequantized to `dtype`, and its tokenizer into the new directory `target`.

    Returns the number of tensors of each type that the file holds ("Q4_1", "F32", …). The directory appears when it is whole.

    Raises:
        CheckpointError: no GGUF file, or one that transformers cannot read.
        OutputError: the directory holds something.
        ConfigError: the package gguf is missing.
    """
    types = _types_of(file)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: is there already and not empty; give a new directory")
    temporary = target.with_name(f"{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        for part in _load(file, dtype):
            part.save_pretrained(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return types


def quantized_types(types: dict[str, int]) -> list[str]:
    """Those of a file's types that hold fewer bits than the model had."""
    return sorted(kind for kind in types if kind not in _WHOLE)


def _types_of(file: Path) -> dict[str, int]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a GGUF file")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{file}: not a GGUF file; download it again, or give another")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("the package gguf reads GGUF files and is not installed; pip install 'swsc[demo]'") from None
    reader = _told(file, lambda: GGUFReader(file))
    return dict(Counter(tensor.tensor_type.name for tensor in reader.tensors))


def _load(file: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the converter's own bar knows nothing of terminals
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = _told(file, lambda: AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32))
    # The loaded model counts as quantized by GGUF and refuses to be saved: a fresh one takes its weights.
    plain: Any = type(loaded)(loaded.config)
    plain.to(getattr(torch, dtype))
    plain.load_state_dict(loaded.state_dict())
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain, _told(file, lambda: AutoTokenizer.from_pretrained(**where))


def _told(file: Path, call: Callable[[], Any]) -> Any:
    """What a library makes of the file, or one line on why it does not."""
    try:
        return call()
    except Exception as error:  # no common root for what a damaged or foreign file brings up
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: cannot be read as GGUF ({reason}); give another file") from None
