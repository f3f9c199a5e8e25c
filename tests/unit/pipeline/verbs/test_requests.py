"""Requests are checked before a model is opened or a worker starts."""

from pathlib import Path
from typing import cast

import pytest

from pipeline.errors import ConfigError, OutputError, RunError
from pipeline.evaluation.flow import EvaluationResult
from pipeline.evaluation.lm_eval import LmEvalResult
from pipeline.restoring.flow import RestoreOptions
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated
from pipeline.sweep.rows import Row, SweepResult
from pipeline.verbs.compress import CompressRequest
from pipeline.verbs.convert import ConvertRequest
from pipeline.verbs.evaluate import EvaluateRequest, EvaluateResult, within_positions
from pipeline.verbs.plan import PlanRequest
from pipeline.verbs.restore import RestoreRequest
from pipeline.verbs.sweep import SweepRequest, require_complete


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.txt").write_text("words")
    return str(tmp_path / "texts" / "text.txt")


def test_an_evaluation_must_measure_something(model: str) -> None:
    with pytest.raises(ConfigError, match="--text"):
        EvaluateRequest(model)


def test_a_card_needs_a_perplexity_and_an_uncompressed_result_needs_a_card(model: str, text: str) -> None:
    with pytest.raises(ConfigError, match="uncompressed"):
        EvaluateRequest(model, EvaluateSettings(text=text), uncompressed="result.json")
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        EvaluateRequest(model, card=True)


def test_the_json_of_an_evaluation_replaces_none_of_its_inputs(model: str, text: str, tmp_path: Path) -> None:
    def request(json: str) -> EvaluateRequest:
        return EvaluateRequest(model, EvaluateSettings(text=text), json=json)

    for json in (text, f"{model}/result.json"):
        with pytest.raises(OutputError, match="--json"):
            request(json).json_file()
    with pytest.raises(OutputError, match="missing"):
        request(str(tmp_path / "missing" / "result.json")).json_file()
    assert request(str(tmp_path / "result.json")).json_file() is not None
    assert not (tmp_path / "result.json").exists()


def test_the_json_of_a_plan_replaces_no_config_file(model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("bits: 3")
    config = str(tmp_path / "settings.yaml")
    with pytest.raises(OutputError, match="--config"):
        PlanRequest(model, json=config, config=config).json_file()


def test_an_output_is_separate_from_every_input(model: str, text: str, tmp_path: Path) -> None:
    evaluation = EvaluateSettings(text=text)
    for output in (model, f"{model}/output", str(tmp_path), str(tmp_path / "texts")):
        with pytest.raises(OutputError):
            CompressRequest(model, output, evaluation=evaluation).require_valid()
    CompressRequest(model, str(tmp_path / "output"), evaluation=evaluation).require_valid()


def test_a_cache_is_not_inside_an_output(model: str, tmp_path: Path) -> None:
    output = str(tmp_path / "output")
    request = CompressRequest(model, output, calibration=CalibrationSettings(cache_dir=f"{output}/cache"))
    with pytest.raises(OutputError, match="--cache-dir"):
        request.require_valid()


def test_results_of_a_sweep_are_separate_from_its_inputs(model: str, text: str, tmp_path: Path) -> None:
    def request(out: Path, models: list[str]) -> SweepRequest:
        values = {"models": models, "variants": [{"name": "a"}], "evaluations": [{"text": text}]}
        return SweepRequest(validated(SweepSettings, values), str(out))

    with pytest.raises(ConfigError, match="models"):
        request(tmp_path / "out", []).require_valid()
    for out in (tmp_path / "model", tmp_path / "texts"):
        with pytest.raises(OutputError):
            request(out, [model]).require_valid()
    request(tmp_path / "out", [model]).require_valid()


def test_a_restored_model_is_not_inside_the_compressed_one(model: str) -> None:
    with pytest.raises(OutputError):
        RestoreRequest(model, f"{model}/dense", RestoreOptions()).require_valid()


def test_a_conversion_writes_local_directories_only() -> None:
    with pytest.raises(OutputError, match="s3://"):
        ConvertRequest("model.gguf", "s3://bucket/model").require_valid()


def test_only_the_default_window_length_is_limited_to_the_positions_of_a_model() -> None:
    config = {"max_position_embeddings": 256}
    for given, positions, length in (({}, config, 256), ({"seqlen": 300}, config, 300), ({}, {}, 2048)):
        settings, note = within_positions(EvaluateSettings(text="t", **given), positions)
        assert settings.seqlen == length
        assert bool(note) == bool(positions)


def test_the_json_of_an_evaluation_has_both_measurements(model: str, text: str) -> None:
    request = EvaluateRequest(model, EvaluateSettings(text=text))
    perplexity = cast(EvaluationResult, {"model": model, "perplexity": 2.0})
    lm_eval: LmEvalResult = {"model": model, "lm_eval": {}, "tables": "", "seconds": 1.0}
    assert EvaluateResult(request, "", perplexity).to_json() == perplexity
    assert EvaluateResult(request, "", perplexity, lm_eval).to_json() == {**perplexity, "lm_eval": {}}
    assert EvaluateResult(request, "", None, lm_eval).to_json() == {"model": model, "lm_eval": {}}


def test_a_sweep_with_a_failed_row_names_its_cause() -> None:
    rows: list[Row] = [{"variant": "a", "error": None}, {"variant": "b", "error": "out of memory"}]
    require_complete(SweepResult(rows[:1], [], 0.0))
    with pytest.raises(RunError, match=r"1 of 2 rows .* b: out of memory"):
        require_complete(SweepResult(rows, [], 0.0))
