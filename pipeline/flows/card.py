"""The card of a compression, of a restoring, and what a measurement adds to it."""

import shlex
from collections.abc import Mapping
from typing import Any

from pipeline.config import CompressSettings
from pipeline.model.artifact import Model
from pipeline.model.card import About, Compressed, make_card, read_source_card
from pipeline.model.checkpoint import DTYPES, TORCH_TO_SAFETENSORS, Checkpoint
from pipeline.model.plan import Plan
from pipeline.run.progress import say


def card_of_compression(
    source: Checkpoint, plan: Plan, rows: Mapping[str, Mapping[str, Any]], settings: CompressSettings, calibration: str
) -> str:
    """The card of what `compress_model` has made; `calibration`: the text in words, "" without one."""
    matrices = tuple(Compressed(name, _pair(row["entry"]["shape"]), row["stored_bytes"]) for name, row in rows.items())
    copied = sum(decision.info.nbytes for decision in plan.decisions if decision.action == "copied")
    compact = copied + sum(matrix.nbytes for matrix in matrices)
    about = About(
        form=settings.format,
        how=_how(settings, calibration),
        matrices=matrices,
        weights=plan.weights,
        before=source.nbytes,
        after=compact if settings.format == "swsc" else source.nbytes,
        compact=compact,
    )
    return _made(source, about)


def card_of_restoring(model: Model) -> str:
    """The card of what `restore_model` makes of a compressed model."""
    tensors = model.checkpoint.tensors
    matrices = tuple(
        Compressed(name, _pair(entry["shape"]), sum(tensors[part].nbytes for part in model.parts(name).values()))
        for name, entry in model.entries.items()
    )
    dense = sum(one.weights * _width(model.entries[one.name]["dtype"]) for one in matrices)
    about = About(
        form="dense",
        how="Restored by `swsc restore` from the compact form of the model.",
        matrices=matrices,
        weights=model.weights,
        before=model.checkpoint.nbytes,
        after=model.checkpoint.nbytes - sum(one.nbytes for one in matrices) + dense,
        compact=model.checkpoint.nbytes,
        restored=True,
    )
    return _made(model.checkpoint, about)


def _made(source: Checkpoint, about: About) -> str:
    own = read_source_card(source)
    if own.problem:
        say(f"note: README.md of the model: {own.problem}: its licence and language are not carried over")
    return make_card(source, own, about)


def _pair(shape: list[int]) -> tuple[int, int]:
    return shape[0], shape[1]


def _width(dtype: str) -> int:
    return DTYPES[TORCH_TO_SAFETENSORS[dtype]][1]


def _how(settings: CompressSettings, calibration: str) -> str:
    """The command, from the settings alone: what was typed may hold paths, and its order says nothing."""
    given = {"method": settings.method, "preset": settings.preset, **settings.model_dump(exclude_defaults=True)}
    flags = " ".join(_flag(name, value) for name, value in given.items())
    calibrated = f"\n\nCalibrated on {calibration}." if calibration else ""
    return f"```\nswsc compress MODEL OUTPUT {flags}\n```{calibrated}"


def _flag(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    words = (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return f"{flag} {shlex.quote(words)}"
