"""Model cards of compressions and restorations, and the perplexities that evaluations add to them."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.console import log
from pipeline.errors import ConfigError, DamageError, OutputError, first_line
from pipeline.models.stored_model import Model
from pipeline.outputs.atomic_edit import edit_file, require_editable
from pipeline.outputs.card_metrics import PROTOCOL, Perplexity, with_evaluation
from pipeline.outputs.model_card import CARD, CardFacts, MatrixFacts, make_card, read_source_card
from pipeline.outputs.report_rows import MatrixResult
from pipeline.planning.plan import Plan
from pipeline.settings.compression import CompressSettings
from pipeline.storage.records import EvaluationRecord, read_record
from pipeline.storage.store import Store


def card_of_compression(
    source: Checkpoint, plan: Plan, results: Iterable[MatrixResult], settings: CompressSettings, calibration: str
) -> str:
    """The card of a compression.

    Args:
        calibration: description of the calibration text; "" without one.
    """
    matrices = tuple(MatrixFacts(result.row.name, result.entry.shape, result.row.stored_bytes) for result in results)
    estimated_bytes = sum(decision.stored_bytes for decision in plan.compressed)
    compact_bytes = plan.stored_bytes - estimated_bytes + sum(matrix.nbytes for matrix in matrices)
    facts = CardFacts(
        form=settings.format,
        production=_command(settings) + (f"\n\nCalibrated on {calibration}." if calibration else ""),
        matrices=matrices,
        weights=plan.weights,
        source_bytes=source.nbytes,
        output_bytes=compact_bytes if settings.format == "swsc" else plan.stored_bytes_as("dense"),
        compact_bytes=compact_bytes,
    )
    return _card(source, facts)


def card_of_restoring(model: Model) -> str:
    """The card of the dense model that is restored from a compressed one."""
    tensors = model.checkpoint.tensors
    matrices = tuple(
        MatrixFacts(name, entry.shape, sum(tensors[part].nbytes for part in model.parts(name).values()))
        for name, entry in model.entries.items()
    )
    facts = CardFacts(
        form="dense",
        production="Restored from the compressed model by `swsc restore`.",
        matrices=matrices,
        weights=model.weights,
        source_bytes=model.checkpoint.nbytes,
        output_bytes=sum(map(model.nbytes, model.names)),
        compact_bytes=model.checkpoint.nbytes,
        restored=True,
    )
    return _card(model.checkpoint, facts)


def require_card(location: str) -> None:
    """Check before an evaluation that its result can be added to the card of the output at `location`.

    Raises:
        OutputError: there is no finished local output with a card.
        DamageError: the card is not as it was written.
    """
    store = Store.at(location)
    if not store.is_local:
        raise OutputError(f"{location}: cards can be edited in local outputs only; give a directory on a disk")
    require_editable(store, CARD)


def add_evaluation(
    location: str, result: Mapping[str, object], uncompressed: Mapping[str, object] | None = None
) -> None:
    """Add a perplexity to the card of the output at `location`, or replace the one of the same protocol.

    Args:
        result: the JSON of `swsc evaluate`.
        uncompressed: the same for the uncompressed model.

    Raises:
        ConfigError: `uncompressed` was measured by another protocol.
        OutputError, DamageError: as `require_card`.
    """
    require_card(location)
    if uncompressed is not None:
        _require_same_protocol(result, uncompressed)
    perplexity = _perplexity(result, uncompressed)
    try:
        edit_file(Store.at(location), CARD, lambda card: with_evaluation(card, perplexity), on_wait=log)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # listed in the manifest, but not a card of swsc
        raise DamageError(
            f"{location}: {CARD} is not a card of swsc ({first_line(error)}); write the output again with --overwrite"
        ) from None


def _require_same_protocol(result: Mapping[str, object], uncompressed: Mapping[str, object]) -> None:
    differences = [
        f"{key} {uncompressed.get(key)!r}, not {result[key]!r}"
        for key in PROTOCOL
        if uncompressed.get(key) != result[key]
    ]
    if differences:
        raise ConfigError(
            f"uncompressed: measured by another protocol ({'; '.join(differences)}); measure it by the same one"
        )


def _perplexity(result: Mapping[str, Any], uncompressed: Mapping[str, Any] | None) -> Perplexity:
    return Perplexity(
        value=result["perplexity"],
        text=result["text"],
        **{key: result[key] for key in PROTOCOL},
        uncompressed=float(uncompressed["perplexity"]) if uncompressed else None,
    )


def read_result(location: str) -> dict[str, Any]:
    """Read a file that `swsc evaluate --json` has written; raise ConfigError if it is not one."""
    file = Store.at(location)
    try:
        return read_record(file.parent, file.name, EvaluationRecord)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{location}: not a result of `swsc evaluate --json` ({error}); write one for the uncompressed model"
        ) from None


def _card(source: Checkpoint, facts: CardFacts) -> str:
    source_card = read_source_card(source)
    if source_card.problem:
        log(f"note: README.md of the model: {source_card.problem}; its licence and language are not copied")
    return make_card(source, source_card, facts)


def _command(settings: CompressSettings) -> str:
    """The command that repeats the compression, from the settings alone: the typed command may contain paths."""
    given = {"method": settings.method, "preset": settings.preset, **settings.model_dump(exclude_defaults=True)}
    flags = " ".join(_flag(name, value) for name, value in given.items())
    return f"```\nswsc compress MODEL OUTPUT {flags}\n```"


def _flag(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, float):
        words = words.removesuffix(".0")
    return f"{flag} {shlex.quote(words)}"
