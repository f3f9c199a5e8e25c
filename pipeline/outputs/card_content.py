"""The card of a compression, of a restoring, and what a measurement adds to it."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.console import log
from pipeline.errors import ConfigError, DamageError, OutputError, first_line
from pipeline.models.stored_model import Model
from pipeline.outputs.atomic_edit import amend, require_amendable
from pipeline.outputs.card_metrics import PROTOCOL, with_evaluation
from pipeline.outputs.model_card import CARD, About, Compressed, make_card, read_source_card
from pipeline.outputs.report_rows import MatrixResult
from pipeline.planning.plan import Plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.records import EvaluationRecord, read_record
from pipeline.storage.store import Store


def card_of_compression(
    source: Checkpoint, plan: Plan, results: Iterable[MatrixResult], settings: CompressSettings, calibration: str
) -> str:
    """The card of what `compress_model` has made; `calibration`: the text in words, "" without one."""
    matrices = tuple(Compressed(one.row.name, one.entry.shape, one.row.stored_bytes) for one in results)
    compact = plan.stored_bytes - sum(one.stored_bytes for one in plan.compressed) + sum(one.nbytes for one in matrices)
    about = About(
        form=settings.format,
        how=_how(settings, calibration),
        matrices=matrices,
        weights=plan.weights,
        before=source.nbytes,
        after=compact if settings.format == "swsc" else plan.stored_bytes_as("dense"),
        compact=compact,
    )
    return _made(source, about)


def card_of_restoring(model: Model) -> str:
    """The card of what `restore_model` makes of a compressed model."""
    tensors = model.checkpoint.tensors
    matrices = tuple(
        Compressed(name, entry.shape, sum(tensors[part].nbytes for part in model.parts(name).values()))
        for name, entry in model.entries.items()
    )
    about = About(
        form="dense",
        how="Restored by `swsc restore` from the compact form of the model.",
        matrices=matrices,
        weights=model.weights,
        before=model.checkpoint.nbytes,
        after=sum(map(model.nbytes, model.names)),
        compact=model.checkpoint.nbytes,
        restored=True,
    )
    return _made(model.checkpoint, about)


def require_card(location: str) -> None:
    """Raise OutputError for a place whose card no measurement can be added to, before the measurement; DamageError for a changed card."""
    store = Store.at(location)
    if not store.is_local:
        raise OutputError(f"{location}: a card is written into a local output only; give its directory on a disk")
    require_amendable(store, CARD)


def add_evaluation(location: str, result: Mapping[str, Any], uncompressed: Mapping[str, Any] | None = None) -> None:
    """Write a perplexity into the card of the output at `location`; one of the same protocol gives way to it.

    Args:
        uncompressed: the result of the model before it was compressed.

    Raises:
        ConfigError: `uncompressed` was measured by another protocol. OutputError, DamageError: as `require_card`.
    """
    require_card(location)
    before = None if uncompressed is None else _comparable(result, uncompressed)
    try:
        amend(Store.at(location), CARD, lambda card: with_evaluation(card, result, before), on_wait=log)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a card by another hand, listed as ours
        reason = first_line(error)
        raise DamageError(
            f"{location}: {CARD} is no card that figures can be added to ({reason}); make the output again by --overwrite"
        ) from None


def _comparable(result: Mapping[str, Any], uncompressed: Mapping[str, Any]) -> float:
    differing = [
        f"{key} {uncompressed.get(key)!r}, not {result[key]!r}"
        for key in PROTOCOL
        if uncompressed.get(key) != result[key]
    ]
    if differing:
        raise ConfigError(
            f"uncompressed: measured by another protocol ({'; '.join(differing)}); measure it by the same one"
        )
    return float(uncompressed["perplexity"])


def read_result(location: str) -> dict[str, Any]:
    """What `swsc evaluate --json` has written there; ConfigError if it is none."""
    file = Store.at(location)
    try:
        return read_record(file.parent, file.name, EvaluationRecord)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{location}: not a result of `swsc evaluate --json` ({error}); make one of the uncompressed model"
        ) from None


def _made(source: Checkpoint, about: About) -> str:
    own = read_source_card(source)
    if own.problem:
        log(f"note: README.md of the model: {own.problem}: its licence and language are not carried over")
    return make_card(source, own, about)


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
    words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, float):
        words = words.removesuffix(".0")
    return f"{flag} {shlex.quote(words)}"
