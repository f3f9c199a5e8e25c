"""A GGUF file in, a plain safetensors checkpoint out: llama.cpp's blocks of few bits are dequantized.

transformers knows how the tensors of each architecture are named and permuted in GGUF, so it reads the file. What comes out
has the values that the GGUF file stands for, not those of the model that it was made from; a note in it says so, which
goes on into all that is made of it. A file that is given as a model is dequantized once, into a cache beside it, which whoever
sees the file sees too.
"""

import errno
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, ConfigError, OutputError, SwscError
from pipeline.model.files import TEMPORARY
from pipeline.model.lease import acquire
from pipeline.model.store import Store, require_room

NOTE = "dequantized.json"  # in a checkpoint: the file that it was made of, and what that held
DTYPE = "bfloat16"  # of a checkpoint, unless another is asked for
NOT_WHOLE = (
    "not a whole model, or of a kind that transformers cannot read from GGUF; of a model in several files make one"
    " (llama-gguf-split --merge), or give another"
)
_MAGIC = b"GGUF"
_WHOLE = ("F64", "F32", "F16", "BF16")  # types that are not quantized
_HEAD, _SAMPLES, _SAMPLE_BYTES = 16 << 20, 4096, 4096  # of a file, that tell it from another


@dataclass(frozen=True)
class Dequantized:
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


def is_gguf(location: str) -> bool:
    """Whether it is the name of a GGUF file, wherever that lies."""
    return location.lower().endswith(".gguf") and not os.path.isdir(location)


def convert_gguf(file: Path, target: str, dtype: str = DTYPE) -> Dequantized:
    """Write the model in `file`, dequantized to `dtype`, and its tokenizer into the new directory `target`.

    The directory appears when it is whole. Two that make the same do it one after the other.

    Raises:
        CheckpointError: no GGUF file, or one that transformers cannot read, or that lacks tensors of the model.
        OutputError: the directory holds something, or there is no room for it.
        ConfigError: the package gguf is missing.
    """
    _require_gguf(file)
    store = Store.at(target)
    if os.path.isfile(store.root) or store.entries():
        raise OutputError(f"{target}: is there already and not empty; give a new directory")
    return _made(file, store, dtype)


def kept_checkpoint(location: str) -> str:
    """Directory of the checkpoint that the GGUF file at `location` stands for: dequantized, if it is not there yet.

    Raises:
        CheckpointError: as `convert_gguf`, or the file is not on a disk of this machine. OutputError: no room beside it.
    """
    file, store = _kept(location)
    found = read_note(store) if store.exists(NOTE) else _made(file, store, DTYPE)
    if found:
        warn(location, found)
    return store.root


def is_kept(location: str) -> bool:
    """Whether the GGUF file at `location` was dequantized before."""
    return _kept(location)[1].exists(NOTE)


def read_note(store: Store) -> Dequantized | None:
    """What the checkpoint in `store` was dequantized from; None if it was not."""
    if not store.exists(NOTE):
        return None
    try:
        note = store.read_json(NOTE, 1 << 20)
        types = {str(kind): int(count) for kind, count in note["types"].items()}
        file, baseline, licence = (_word(note[key]) for key in ("file", "baseline", "licence"))
        return Dequantized(file, baseline, licence, types)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{store.root}/{NOTE}: not as `swsc convert` writes it ({error}); remove it") from None


def warn(location: str, about: Dequantized) -> None:
    """Say what figures of a model that was dequantized are figures of; once in a process."""
    if about.baseline:
        _say_once(
            f"note: {location}: figures are those of a dequantized baseline of type {about.baseline}, not of the model that was"
            " quantized"
        )


def told(file: Path, call: Callable[[], Any]) -> Any:
    """What a library makes of the file, or one line on why it does not."""
    try:
        return call()
    except SwscError:
        raise
    except Exception as error:  # no common root for what a damaged or foreign file brings up
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: cannot be read as GGUF ({reason}); give another file") from None


def quiet_transformers() -> None:
    """No bars and no advice of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def where(file: Path) -> dict[str, str]:
    """How transformers is told of a GGUF file."""
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def header_of(file: Path) -> tuple[Dequantized, int]:
    """What the file holds, and its number of weights.

    Raises:
        CheckpointError: no GGUF file, or a damaged one. ConfigError: the package gguf is missing.
    """
    _require_gguf(file)
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError:
        raise ConfigError("the package gguf reads GGUF files and is not installed; pip install 'swsc[demo]'") from None
    reader = told(file, lambda: GGUFReader(file))
    types = dict(Counter(tensor.tensor_type.name for tensor in reader.tensors))
    kind, licence = (_value(reader, f"general.{key}") for key in ("file_type", "license"))
    named = {one.value: one.name.removeprefix("MOSTLY_") for one in LlamaFileType}.get(kind, "")
    quantized = sorted(types.keys() - set(_WHOLE))
    baseline = (named or ", ".join(quantized)) if quantized else ""
    return Dequantized(file.name, baseline, _word(licence or ""), types), sum(
        int(tensor.n_elements) for tensor in reader.tensors
    )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def _word(value: object) -> str:
    """What a file says of itself, in one line that a card may hold."""
    text = " ".join(str(value).split())
    return text if text.isprintable() else ""


def _require_gguf(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a GGUF file")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{file}: not a GGUF file; download it again, or give another")


def _kept(location: str) -> tuple[Path, Store]:
    """A GGUF file, and where its checkpoint is kept, or would be."""
    if "://" in location:
        raise CheckpointError(
            f"{location}: a GGUF file is read from a disk only; copy it to one that all nodes see, and give that"
        )
    file = Path(os.path.abspath(location))
    _require_gguf(file)
    return file, Store.at(f"{file.parent}/.swsc-cache/gguf-{_fingerprint(file)[:16]}")


def _fingerprint(file: Path) -> str:
    """Over the head of the file, which has names and vocabulary, and samples so close together that none of its matrices is left out."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {DTYPE}".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEAD))
        for number in range(_SAMPLES if size > _HEAD else 0):
            opened.seek(_HEAD + (size - _HEAD) * number // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _made(file: Path, store: Store, dtype: str) -> Dequantized:
    """Write the checkpoint into a folder beside `store`, and put it there when it is whole.

    Whoever writes holds a lease; what one that was killed has left is made anew.
    """
    beside = Store(f"{store.root}{TEMPORARY}")
    try:
        lease = acquire(beside, wait=_say)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OutputError(
            f"{error.filename}: nothing can be written there; make a checkpoint elsewhere: swsc convert {file} NEW_DIR"
        ) from None
    try:
        if not store.exists(NOTE):
            _write(file, beside, dtype)
            store.remove_empty()
            os.rename(f"{beside.root}/whole", store.root)
        found = read_note(store)
        assert found is not None
        return found
    finally:
        beside.remove("whole")
        lease.release()
        with beside.locked():
            beside.below(".swsc").remove_empty()
            beside.remove_empty()


def _write(file: Path, beside: Store, dtype: str) -> None:
    """Write the checkpoint into the folder `whole` of `beside`."""
    quiet_transformers()
    about, weights = header_of(file)
    beside.remove("whole")
    require_room(beside, weights * (4 if dtype == "float32" else 2))
    _say(f"{file}: is dequantized to {dtype}, into {beside.root.removesuffix(TEMPORARY)}")
    whole = beside.below("whole")
    for part in _load(file, dtype):
        _save(part, whole.root)
    whole.write_json(NOTE, vars(about))
    for name in whole.names():
        with open(f"{whole.root}/{name}", "rb") as written:
            os.fsync(written.fileno())  # or a power cut may leave names without bytes


def _save(part: Any, folder: str) -> None:
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of safetensors, which has a class of its own for a disk that is full
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"{folder}: cannot be written ({reason}); make room, and run the same command again"
        ) from None


def _load(file: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how: dict[str, Any] = {
        **where(file),
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    with redirect_stderr(StringIO()):  # the converter's bar, which knows nothing of terminals
        loaded, info = told(file, lambda: AutoModelForCausalLM.from_pretrained(**how))
    lacking = [f"{name} is not in it" for name in sorted(info["missing_keys"])]
    differing = sorted((name, list(there), list(wanted)) for name, there, wanted in info["mismatched_keys"])
    lacking += [f"{name} is {there} in it, and {wanted} by its header" for name, there, wanted in differing]
    if lacking:  # transformers would draw them at random
        raise CheckpointError(f"{file}: {lacking[0]} ({len(lacking)} tensors in all): {NOT_WHOLE}")
    # The loaded model counts as quantized by GGUF and refuses to be saved: one without weights takes its weights.
    with torch.device("meta"):
        plain: Any = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.to(getattr(torch, dtype))  # what transformers would keep in float32, too
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain, told(file, lambda: AutoTokenizer.from_pretrained(**where(file)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_say_once = lru_cache(_say)
