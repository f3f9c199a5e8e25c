"""How the results of the verbs are printed to standard output."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.evaluation.flow import EvaluationResult
from pipeline.planning.plan import Plan
from pipeline.report.tables import print_table
from pipeline.settings.sweep import SweepSettings
from pipeline.sweep.rows import Row, SweepResult
from pipeline.verbs.compress import CompressResult
from pipeline.verbs.evaluate import EvaluateResult
from pipeline.verbs.plan import PlanResult, comparable_paper_bits
from pipeline.verbs.plan_stages import StagePlan
from pipeline.verbs.restore import RestoreResult

# Number of tensor names in a note.
_SHOWN = 4
# Estimates of a plan that are limits if a calibration chooses the bits of each matrix.
_ALLOCATED = frozenset({"output_bytes", "disk_bytes", "compressed_bits_per_weight", "whole_model_bits_per_weight"})


def print_compression(result: CompressResult) -> None:
    """A table of the compressed matrices, and one line about the whole model."""
    report, output = result.report, result.request.output
    print_table(result.matrices, ["name", "shape", "paper_bits", "bits_per_weight", "relative_error"])
    print(
        f"{output}: {report['compressed_bits_per_weight']:.3f} bits per weight over the compressed matrices"
        f" ({report['share_of_weights_compressed']:.1%} of all weights),"
        f" {report['whole_model_bits_per_weight']:.3f} over the whole model,"
        f" {result.seconds:.1f} s{_resumed(report)}"
    )
    tuning = report.get("tuning")
    if isinstance(tuning, Mapping):
        print(
            f"tuning: KL divergence to the original model {tuning['divergence_before']:.4f} to"
            f" {tuning['divergence_after']:.4f} nats per token on held-out windows"
            + ("" if tuning["applied"] else "; not lower, so tuning was not applied")
        )


def _resumed(report: Mapping[str, object]) -> str:
    if report.get("resumed"):
        return " (it was complete already)"
    count = report["files_of_an_earlier_run"]
    return f" in this run; {count} files were finished by an earlier run" if count else ""


def print_preset_hint(result: CompressResult) -> None:
    """After a compression that divides its bits as in the paper, name the presets that lose less accuracy."""
    settings = result.request.settings
    if settings.method == "swsc" and settings.preset == "paper" and settings.clusters is None:
        print(
            "hint: at equal bits, --preset best (with --calibration TEXT) and --preset data-free lose much less"
            " accuracy than the paper's form"
        )


def print_evaluation(evaluation: EvaluationResult, note: str = "") -> None:
    """A perplexity, and the protocol it was measured by, after a note that may be empty."""
    if note:
        print(f"note: {note}")
    seconds = evaluation["seconds"]
    print(f"{evaluation['model']}: perplexity {evaluation['perplexity']:.4f}, {seconds:.1f} s\n{_protocol(evaluation)}")


def print_lm_eval(result: EvaluateResult) -> None:
    """The tables of lm-eval."""
    tasks, settings = result.lm_eval, result.request.lm_eval
    if tasks and settings:
        print(f"{tasks['model']}: {', '.join(settings.tasks)}, {tasks['seconds']:.1f} s\n\n{tasks['tables']}")


def _protocol(evaluation: Mapping[str, object]) -> str:
    """How a perplexity was measured. Perplexities of different protocols cannot be compared."""
    documents = evaluation.get("text_documents")
    column = ""
    if documents is not None:
        column = f": column {evaluation['text_column']!r} of {documents:,} documents, joined by blank lines"
    return (
        f"  {evaluation['windows']} windows of {evaluation['seqlen']} tokens, no overlap, BOS {evaluation['bos']},"
        f" {evaluation['dtype']}\n  text {evaluation['text']}{column}"
        f" (sha256 {evaluation['text_sha256']:.16}…, {evaluation['text_tokens']} tokens)"
    )


def print_plan(result: PlanResult) -> None:
    """A table of the matrices to compress, the number of tensors per action and reason, and the estimates."""
    plan, paper_bits = result.plan, comparable_paper_bits(result.plan)
    rows = [
        {
            "name": decision.info.name,
            "shape": list(decision.info.shape),
            "paper_bits": paper_bits.get(decision.info.name),
            "bits_per_weight": 8 * decision.stored_bytes / decision.info.count,
        }
        for decision in plan.compressed
    ]
    print_table(rows, ["name", "shape", "paper_bits", "bits_per_weight"])
    if warning := _larger_than_dense(plan):
        print(warning)
    counts = Counter((decision.action, decision.reason) for decision in plan.decisions)
    for (action, reason), count in sorted(counts.items()):
        print(f"{action} ({reason}): {count} tensors")
    for name, reason in result.left_out.items():
        print(f"left out: file {name} ({reason})")
    if result.request.allocates:
        print("note: the calibration replaces the forms and bits of single matrices that are shown above")
    _print_stages(result.stages)
    for key, value in result.estimates.items():
        limit = "at most " if result.request.allocates and key in _ALLOCATED else ""
        print(f"{key}: {limit}{value:,.3f}" if isinstance(value, float) else f"{key}: {limit}{value:,}")


def _larger_than_dense(plan: Plan) -> str:
    """A warning of matrices whose compressed form takes more bytes than they take now; empty without any."""
    larger = [decision for decision in plan.compressed if decision.stored_bytes > decision.info.nbytes]
    if not larger:
        return ""
    worst = max(larger, key=lambda decision: decision.stored_bytes / decision.info.nbytes)
    stored, dense = (8 * nbytes / worst.info.count for nbytes in (worst.stored_bytes, worst.info.nbytes))
    return (
        f"warning: {len(larger)} of {len(plan.compressed)} matrices take more bits per weight than without compression"
        f" ({worst.info.name}: {stored:.3f} instead of {dense:g}); lower --clusters or --rank"
    )


def _print_stages(stages: Sequence[StagePlan]) -> None:
    """A table of the stages that are possible, and a line for each that is not."""
    rows = [
        {
            "stage": stage.stage,
            "way": stage.way,
            "workers": stage.workers,
            "host_gb": stage.host_bytes / 1e9,
            "device_gb": stage.device_bytes / 1e9 or None,
            "read_gb": stage.read_bytes / 1e9,
            "hidden_gb": stage.hidden_bytes / 1e9 or None,
            "seconds": stage.seconds,
        }
        for stage in stages
        if stage.is_possible
    ]
    print_table(rows, ["stage", "way", "workers", "host_gb", "device_gb", "read_gb", "hidden_gb", "seconds"])
    for stage in stages:
        if not stage.is_possible:
            print(f"{stage.stage}: {stage.way}")


def print_restoration(result: RestoreResult) -> None:
    """The number of restored tensors, and what an adapter holds of them."""
    dense, rows = result.request.dense, result.rows
    restored = [row for row in rows if row["action"] == "restored"]
    print(f"{dense}: {len(restored)} of {len(rows)} tensors restored, the others copied")
    if not result.request.options.adapter:
        return
    in_adapter = sum(ADAPTER_FOLDER in str(row["reason"]) for row in restored)
    whole = [str(row["name"]) for row in restored if "whole" in str(row["reason"])]
    print(
        f"{dense}/{ADAPTER_FOLDER}: LoRA adapter for PEFT with the low-rank part of {in_adapter} of them;"
        " the model needs it"
    )
    if whole:
        names = ", ".join(whole[:_SHOWN])
        print(f"note: {len(whole)} tensors contain their low-rank part, because they are not linear layers: {names}")


def print_sweep(settings: SweepSettings, result: SweepResult) -> None:
    """A table per model, the protocol of each evaluation and, if the settings ask for it, a row per matrix."""
    keys = ["variant", "paper_bits", "bits_per_weight", "whole_model_bits_per_weight", "relative_error", "tuning"]
    texts = ["text", "seqlen"] if len(settings.evaluations) > 1 else []
    for model in settings.models:
        rows = [_without_paper_bits(row, result.segmented) for row in result.rows if row["model"] == model]
        print_table(rows, [*keys, *texts, "perplexity", "reference", "error"], title=model)
    for row in {(row["model"], row.get("text"), row.get("seqlen")): row for row in result.rows}.values():
        if row.get("perplexity") is not None:
            print(_protocol(row))
    if settings.matrices:
        print_table(result.tensors, ["model", "name", "variant", "bits_per_weight", "mean_squared_error"])


def _without_paper_bits(row: Row, segmented: Collection[str]) -> Row:
    """The row of a table; bits by the paper's count are left out where the paper has no count."""
    return {**row, "paper_bits": None} if row["variant"] in segmented else row


def print_sweep_files(out: str, result: SweepResult) -> None:
    """Where the results of a sweep were written."""
    print(f"{out}/results.json, results.parquet, tensors.parquet: {len(result.rows)} rows, {result.seconds:.1f} s")
