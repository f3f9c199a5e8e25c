"""The verb evaluate: a dense or compressed model in, its perplexity and its results on lm-eval tasks out."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pipeline.architectures.model_config import ModelConfig, max_positions
from pipeline.checkpoints.integrity.source_digests import SourceDigests
from pipeline.engine.stage import Pools
from pipeline.errors import ConfigError
from pipeline.evaluation.flow import EvaluationResult, evaluate_model
from pipeline.evaluation.lm_eval import LmEvalResult, evaluate_lm_eval, require_answerable, require_harness
from pipeline.models.causality import require_causal
from pipeline.models.stored_model import Model, open_model
from pipeline.outputs.card_content import add_evaluation, read_result, require_card
from pipeline.outputs.preflight import examine
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.lm_eval import LmEvalSettings
from pipeline.settings.loading import SourceSettings
from pipeline.verbs.json_file import JsonFile
from pipeline.verification.flow import verify_output
from pipeline.verification.source import verified_digests


@dataclass(frozen=True)
class EvaluateRequest:
    """An evaluation of the model at `model`.

    Attributes:
        perplexity: measure perplexity on this text.
        lm_eval: run these tasks of lm-evaluation-harness.
        json: file that receives the result.
        card: add the perplexity to the model card of a local output.
        uncompressed: file with the result of the uncompressed model, which the card shows beside it.
        verify: compare an output with its manifest first.
    """

    model: str
    perplexity: EvaluateSettings | None = None
    lm_eval: LmEvalSettings | None = None
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    loading: SourceSettings = field(default_factory=SourceSettings)
    json: str | None = None
    card: bool = False
    uncompressed: str | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a request that measures nothing, or for options without an effect."""
        if self.perplexity is None and self.lm_eval is None:
            raise ConfigError(
                "nothing to evaluate; give --text TEXT for perplexity, --tasks NAMES for lm-eval, or both"
            )
        if self.uncompressed and not self.card:
            raise ConfigError("uncompressed: only applies with --card; add it, or remove --uncompressed")
        if self.card and self.perplexity is None:
            raise ConfigError("card: shows a perplexity; add --text TEXT")

    @property
    def trusted(self) -> bool:
        """Whether code that the model brings may run."""
        return any(settings.trust_remote_code for settings in (self.perplexity, self.lm_eval) if settings)

    def json_file(self) -> JsonFile | None:
        """The file of the result; OutputError if it cannot be written."""
        inputs = [
            ("MODEL", self.model),
            ("--text", self.perplexity.text if self.perplexity else None),
            ("--uncompressed", self.uncompressed),
            ("--include-path", self.lm_eval.include_path if self.lm_eval else None),
            ("--verify-source", self.loading.verify_source),
        ]
        return JsonFile.at(self.json, inputs) if self.json else None


@dataclass(frozen=True)
class EvaluateResult:
    """Results of the measurements that were requested.

    Attributes:
        note: what the user should know about the length of the windows; may be empty.
        perplexity: perplexity, loss of each window and protocol, as JSON.
        lm_eval: results of the lm-eval tasks, their tables and seconds.
    """

    request: EvaluateRequest
    note: str = ""
    perplexity: EvaluationResult | None = None
    lm_eval: LmEvalResult | None = None

    def to_json(self) -> dict[str, object]:
        """The result as `--json` writes it."""
        if self.lm_eval is None:
            return {**(self.perplexity or {})}
        return {"model": self.lm_eval["model"], **(self.perplexity or {}), "lm_eval": self.lm_eval["lm_eval"]}


def evaluate(
    request: EvaluateRequest, on_stage: Callable[[EvaluateResult], None] = lambda result: None
) -> EvaluateResult:
    """Evaluate a model; its files and the texts are checked before a worker starts.

    Args:
        on_stage: receives the result so far after each measurement, when the JSON file is written. A later one may
            fail.

    Raises:
        ConfigError, CheckpointError, TextError, OutputError: a mistake in the request or in a file that it names.
        NonFiniteLoss: the loss of a window is NaN or infinite.
        RunError: tasks failed.
    """
    json_file = request.json_file()
    model = open_model(request.model)
    result = _checked(request, model)
    request = result.request
    uncompressed = read_result(request.uncompressed) if request.uncompressed else None
    if request.lm_eval:
        require_harness(request.lm_eval)
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    def finish_stage(result: EvaluateResult) -> EvaluateResult:
        if json_file:
            json_file.write(result.to_json())
        on_stage(result)
        return result

    with worker_pools(request.cluster) as pools:
        if request.lm_eval:
            require_answerable(model, request.lm_eval, pools)
        digests = _verified(request, model, pools)
        if request.perplexity:
            perplexity = evaluate_model(request.model, request.perplexity, pools, digests)
            result = finish_stage(replace(result, perplexity=perplexity))
        if request.lm_eval:
            tasks = evaluate_lm_eval(request.model, request.lm_eval, pools, digests)
            result = finish_stage(replace(result, lm_eval=tasks))
    if request.card:
        add_evaluation(request.model, result.to_json(), uncompressed)
    return result


def within_positions(settings: EvaluateSettings, config: ModelConfig) -> tuple[EvaluateSettings, str]:
    """Limit the default window length to the positions of the model.

    Returns:
        The settings, and a note for the user; it is empty for windows that have positions for all tokens.
    """
    positions = max_positions(config)
    if not positions or settings.seqlen <= positions:
        return settings, ""
    if "seqlen" in settings.model_fields_set:
        return settings, f"windows of {settings.seqlen} tokens are longer than the {positions} positions of the model"
    note = f"windows of {positions} tokens, the number of positions of the model"
    return settings.model_copy(update={"seqlen": positions}), note


def _checked(request: EvaluateRequest, model: Model) -> EvaluateResult:
    """Check what needs only the headers of the model and its card.

    Returns:
        A result without measurements, whose request has the window length for this model.
    """
    note = ""
    examine(model, request.trusted, measured=True)
    require_causal(model, request.trusted)
    if request.perplexity:
        settings, note = within_positions(request.perplexity, model.config)
        request = replace(request, perplexity=settings)
    if request.card:
        require_card(request.model)
    return EvaluateResult(request, note)


def _verified(request: EvaluateRequest, model: Model, pools: Pools) -> SourceDigests | None:
    """Verify the files as far as the request asks for it; returns the digests that later reads are compared with."""
    if request.verify:
        verify_output(request.model, pools)
    hashes = request.loading.verify_source
    return verified_digests(model.checkpoint, hashes, pools) if hashes else None
