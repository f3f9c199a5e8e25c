"""What a sweep found, as rows: one a variant × evaluation, and one a variant × tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.architectures.model_config import ModelConfig
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import NonFiniteLoss
from pipeline.evaluation.flow import evaluation_result
from pipeline.outputs.report import bit_totals
from pipeline.outputs.report_rows import CompressedRow, MatrixResult, rows_by_name
from pipeline.settings.sweep import SweepSettings
from pipeline.sweep.runs import Run, Unit
from pipeline.texts.windows import Windows

Row = dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """Rows for people and files: one a variant × evaluation, and one a variant × tensor."""

    rows: list[Row]
    tensors: list[Row]
    seconds: float

    @property
    def measured(self) -> int:
        """Number of rows that hold what was asked for."""
        return len(self.rows) - len(self.failed)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row["error"]]


def tensor_rows(run: Run, found: Mapping[Unit, MatrixResult]) -> dict[str, CompressedRow]:
    """The measurements of a run's tensors, by name."""
    if run.made:
        return rows_by_name(CompressedRow.from_json(row) for row in run.made.table)
    return {name: found[unit].row for name, unit in run.all_units().items() if unit in found}


def tensor_table(run: Run, found: Mapping[Unit, MatrixResult]) -> list[Row]:
    """The same as rows of a table, with all that a report or a record states."""
    if run.made:
        return run.made.table
    return [found[unit].to_json() for unit in run.all_units().values() if unit in found]


def run_rows(
    run: Run,
    settings: SweepSettings,
    checkpoint: Checkpoint,
    windows: list[Windows],
    tensors: Mapping[str, CompressedRow],
) -> list[Row]:
    """A row for each evaluation of a run; one row without a perplexity if the sweep has no evaluations."""
    model = settings.models[run.model]
    about: Row = {"model": model, "variant": run.name, "method": run.variant.method if run.variant else None}
    about["tuning"] = ("applied" if run.made.tuning["applied"] else "not applied") if run.made else None
    about |= _bits(run, tensors) if run.variant else _own_bits(checkpoint)
    published = run.variant.reference if run.variant else settings.reference
    about["reference"] = published.get(known_model(checkpoint.config) or "")
    rows = []
    for number, (cut, text) in enumerate(zip(windows, settings.evaluations, strict=True)):
        row = about | {"text": cut.text, "seqlen": text.seqlen, "windows": len(cut.ids), "error": run.error}
        losses = [loss for part in sorted(p for p in run.losses if p[0] == number) for loss in run.losses[part]]
        try:
            row |= (
                {"perplexity": None} if run.error else evaluation_result(model, losses, cut, text, run.dtypes[number])
            )
        except NonFiniteLoss as error:
            row |= {"perplexity": None, "error": str(error)}
        rows.append(row)
    return rows or [about | {"error": run.error}]


def _own_bits(checkpoint: Checkpoint) -> Row:
    """Bits a weight of a model as it is."""
    return {"whole_model_bits_per_weight": 8 * checkpoint.nbytes / checkpoint.weights, "relative_error": 0.0}


def _bits(run: Run, rows: Mapping[str, CompressedRow]) -> Row:
    """Bits and error over all compressed matrices of a run, weighted by their size; None where some are not there."""
    keys = ("paper_bits", "bits_per_weight", "whole_model_bits_per_weight", "relative_error")
    if not run.plan or len(rows) < len(run.plan.compressed):
        return dict.fromkeys(keys)
    counts = {decision.info.name: decision.info.count for decision in run.plan.compressed}

    def total(key: str) -> float:
        return sum(getattr(rows[name], key) * count for name, count in counts.items())

    whole = bit_totals(run.plan, rows)
    error = total("mean_squared_error") / total("mean_square")
    paper = total("paper_bits") / sum(counts.values())
    values = (paper, whole["compressed_bits_per_weight"], whole["whole_model_bits_per_weight"], error)
    return dict(zip(keys, values, strict=True))


def known_model(config: ModelConfig) -> str | None:
    """Name of a model that published figures are compared with, told by its shape."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    return "Llama-2-7B" if tuple(config.get(key) for key in keys) == ("llama", 4096, 32, 11008, 32000) else None
