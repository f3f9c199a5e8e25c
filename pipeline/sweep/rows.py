"""Rows of the results of a sweep: one per variant and evaluation, and one per variant and matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.architectures.model_config import ModelConfig
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import NonFiniteLoss
from pipeline.evaluation.flow import evaluation_result
from pipeline.outputs.report import bit_totals
from pipeline.outputs.report_rows import CompressedRow, MatrixResult, rows_by_name
from pipeline.planning.plan import Plan
from pipeline.sweep.inputs import SweepInputs
from pipeline.sweep.runs import Run, Unit

# A row as JSON, which results.json and the Parquet files hold.
Row = Mapping[str, object]

_SIZES_AND_ERROR = ("paper_bits", "bits_per_weight", "whole_model_bits_per_weight", "relative_error")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured.

    Attributes:
        rows: one per model, variant and evaluation.
        tensors: one per model, variant and compressed matrix.
        segmented: names of the variants that cut channels into segments; the paper has no count of their bits.
    """

    rows: list[Row]
    tensors: list[Row]
    seconds: float
    segmented: frozenset[str] = frozenset()

    @property
    def measured(self) -> int:
        """Number of rows without an error."""
        return len(self.rows) - len(self.failed)

    @property
    def failed(self) -> list[Row]:
        """Rows with an error."""
        return [row for row in self.rows if row["error"]]


def rows_by_matrix(run: Run, results: Mapping[Unit, MatrixResult]) -> dict[str, CompressedRow]:
    """Matrix -> its measurements, of the matrices of a run that are compressed."""
    if run.tuned:
        return rows_by_name(CompressedRow.from_json(row) for row in run.tuned.rows)
    return {name: results[unit].row for name, unit in run.units.items() if unit in results}


def matrix_table(run: Run, results: Mapping[Unit, MatrixResult]) -> list[Row]:
    """The same measurements as JSON, with everything that a report or a record states."""
    if run.tuned:
        return list(run.tuned.rows)
    return [results[unit].to_json() for unit in run.units.values() if unit in results]


def run_rows(run: Run, inputs: SweepInputs, matrices: Mapping[str, CompressedRow]) -> list[Row]:
    """A row per evaluation of a run; one row without perplexity if the sweep has no evaluations.

    Args:
        matrices: the measurements of the run's matrices.
    """
    header = _header(run, inputs, matrices)
    evaluations = range(len(inputs.settings.evaluations))
    return [header | _evaluation(run, inputs, number) for number in evaluations] or [
        header | {"error": run.measurement.error}
    ]


def _header(run: Run, inputs: SweepInputs, matrices: Mapping[str, CompressedRow]) -> dict[str, object]:
    """What all rows of a run share."""
    checkpoint, variant = inputs.checkpoint_of(run), run.variant
    header: dict[str, object] = {"model": inputs.location_of(run), "variant": run.name}
    header["method"] = variant.method if variant else None
    header["tuning"] = ("applied" if run.tuned.applied else "not applied") if run.tuned else None
    header |= _compressed_bits(run.plan, matrices) if run.plan else _uncompressed_bits(checkpoint)
    references = variant.reference if variant else inputs.settings.reference
    header["reference"] = references.get(known_model(checkpoint.config) or "")
    return header


def _evaluation(run: Run, inputs: SweepInputs, number: int) -> dict[str, object]:
    """Perplexity and protocol of one evaluation of a run, or the error that prevented it."""
    state = run.measurement
    windows, settings = inputs.evaluations_of(run)[number]
    row: dict[str, object] = {"text": windows.text, "seqlen": settings.seqlen, "windows": len(windows.ids)}
    row["error"] = state.error
    if state.error:
        return row | {"perplexity": None}
    parts = sorted(part for part in state.losses if part[0] == number)
    losses = [loss for part in parts for loss in state.losses[part]]
    try:
        return row | dict(evaluation_result(inputs.location_of(run), losses, windows, settings, state.dtypes[number]))
    except NonFiniteLoss as error:
        return row | {"perplexity": None, "error": str(error)}


def _uncompressed_bits(checkpoint: Checkpoint) -> dict[str, object]:
    return {"whole_model_bits_per_weight": 8 * checkpoint.nbytes / checkpoint.weights, "relative_error": 0.0}


def _compressed_bits(plan: Plan, rows: Mapping[str, CompressedRow]) -> dict[str, object]:
    """Bits and relative error over all matrices, weighted by their size; None as long as matrices are missing."""
    if len(rows) < len(plan.compressed):
        return dict.fromkeys(_SIZES_AND_ERROR)
    counts = {decision.info.name: decision.info.count for decision in plan.compressed}

    def total(key: str) -> float:
        return float(sum(getattr(rows[name], key) * count for name, count in counts.items()))

    totals = bit_totals(plan, rows)
    bits = (totals["compressed_bits_per_weight"], totals["whole_model_bits_per_weight"])
    paper_bits = total("paper_bits") / sum(counts.values())
    return dict(
        zip(_SIZES_AND_ERROR, (paper_bits, *bits, total("mean_squared_error") / total("mean_square")), strict=True)
    )


def known_model(config: ModelConfig) -> str | None:
    """Name of the published model with the shape of `config`, if reference figures exist for it; None for others."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    return "Llama-2-7B" if tuple(config.get(key) for key in keys) == ("llama", 4096, 32, 11008, 32000) else None
