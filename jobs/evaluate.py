"""`swsc evaluate MODEL`: perplexity by the standard protocol (`--text`), tasks of lm-evaluation-harness (`--tasks`), or both."""

import argparse
from typing import Any

from jobs.command_line.flags import settings_of, writable
from pipeline.architectures.model_config import ModelConfig, max_positions
from pipeline.errors import ConfigError
from pipeline.models.causality import require_causal
from pipeline.models.stored_model import open_model
from pipeline.outputs.card_content import add_evaluation, read_result, require_card
from pipeline.outputs.preflight import examine
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluation import EvaluateSettings, MeasureSettings
from pipeline.settings.lm_eval import LmEvalSettings
from pipeline.settings.loading import SourceSettings
from pipeline.storage.store import Store

_ASKED_BY: dict[str, type[MeasureSettings]] = {
    "text": EvaluateSettings,
    "tasks": LmEvalSettings,
}  # flag that asks for a measurement -> its settings


def run(arguments: argparse.Namespace) -> int:
    asked = _asked(vars(arguments))
    *wanted, cluster, trust = settings_of(arguments, *asked.values(), ClusterSettings, SourceSettings)
    settings = dict(zip(asked, wanted, strict=True))
    target = writable(arguments.json, _read(vars(arguments))) if arguments.json else None
    model = open_model(arguments.model)  # a damaged model is told of before Ray is started
    examine(model, any(one.trust_remote_code for one in settings.values()), measured=True)
    require_causal(model, any(one.trust_remote_code for one in settings.values()))
    if "text" in settings:
        settings["text"] = within_positions(settings["text"], model.config)
    before = _before(arguments)
    from pipeline.engine.ray_backend.worker_pools import worker_pools
    from pipeline.evaluation.flow import evaluate_model
    from pipeline.evaluation.lm_eval import evaluate_lm_eval, require_harness
    from pipeline.verification.flow import verify_output
    from pipeline.verification.source import verified_digests

    if "tasks" in settings:
        require_harness(settings["tasks"])
    with worker_pools(cluster) as pools:
        if arguments.verify:
            verify_output(arguments.model, pools)
        known = verified_digests(model.checkpoint, trust.verify_source, pools) if trust.verify_source else None
        result: dict[str, Any] = {}
        if "text" in settings:
            result = evaluate_model(arguments.model, settings["text"], pools, known)
            _keep(result, target)  # before anything is printed, or measured by something that may fail
            summarise(result)
        if "tasks" in settings:
            found = evaluate_lm_eval(arguments.model, settings["tasks"], pools, known)
            result = {"model": found["model"], **result, "lm_eval": found["lm_eval"]}
            _keep(result, target)
            print(
                f"{found['model']}: {', '.join(settings['tasks'].tasks)}, {found['seconds']:.1f} s\n\n{found['tables']}"
            )
    if arguments.card:
        add_evaluation(arguments.model, result, before)
    return 0


def _keep(result: dict[str, Any], target: Store | None) -> None:
    """Write the result to where --json asks for it."""
    if target:
        target.parent.write_json(target.name, result)


def _read(given: dict[str, Any]) -> list[tuple[str, str | None]]:
    """What is read, by its name on the command line."""
    flags = {"MODEL": "model", "--text": "text", "--uncompressed": "uncompressed", "--include-path": "include_path"}
    flags["--verify-source"] = "verify_source"
    return [(what, given.get(name)) for what, name in flags.items()]


def _before(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The result of the uncompressed model, if it is given; whatever would keep a card from being written is told of here."""
    if arguments.uncompressed and not arguments.card:
        raise ConfigError("uncompressed means nothing without --card: add it, or drop it")
    if arguments.card:
        if not getattr(arguments, "text", None):
            raise ConfigError("card takes a perplexity: give --text FILE, too")
        require_card(arguments.model)
    return read_result(arguments.uncompressed) if arguments.uncompressed else None


def _asked(given: dict[str, Any]) -> dict[str, type[MeasureSettings]]:
    """The measurements that were asked for; ConfigError for none, and for flags of one that was not."""
    asked = {flag: kind for flag, kind in _ASKED_BY.items() if flag in given}
    if not asked:
        raise ConfigError(
            "nothing to measure: give --text FILE for perplexity, --tasks NAME,… for lm-eval's tasks, or both"
        )
    known = {name for kind in asked.values() for name in kind.model_fields}
    for flag in _ASKED_BY.keys() - asked.keys():
        if idle := sorted(given.keys() & (_ASKED_BY[flag].model_fields.keys() - known)):
            raise ConfigError(f"{', '.join(idle)} mean nothing without --{flag}: add it, or drop them")
    return asked


def within_positions(settings: EvaluateSettings, config: ModelConfig) -> EvaluateSettings:
    """Windows of the default length are cut to what the model was made for; of one that was asked for it is said."""
    positions = max_positions(config)
    if not positions or settings.seqlen <= positions:
        return settings
    if "seqlen" in settings.model_fields_set:
        print(f"note: the model was made for {positions} positions, windows of {settings.seqlen} tokens are longer")
        return settings
    print(f"note: windows of {positions} tokens, the positions that the model was made for")
    return settings.model_copy(update={"seqlen": positions})


def summarise(result: dict[str, Any]) -> None:
    """The figure, and all that must be said beside it."""
    print(f"{result['model']}: perplexity {result['perplexity']:.4f}, {result['seconds']:.1f} s\n{protocol(result)}")


def protocol(result: dict[str, Any]) -> str:
    """How a perplexity was measured; without it the figure means nothing."""
    return (
        f"  {result['windows']} windows of {result['seqlen']} tokens, no overlap, BOS {result['bos']}, {result['dtype']}\n"
        f"  text {result['text']}{_documents(result)} (sha256 {result['text_sha256'][:16]}…, {result['text_tokens']} tokens)"
    )


def _documents(result: dict[str, Any]) -> str:
    if result.get("text_documents") is None:
        return ""
    return f": column {result['text_column']!r} of {result['text_documents']:,} documents, joined by blank lines"
