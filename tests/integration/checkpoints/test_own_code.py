"""Models that bring code of their own: it is run if that is asked for, and then wherever the model is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli import main
from tests.support.tiny import make_text

QK = ["--include", "q_proj|k_proj"]  # roles of a family that is not known are not guessed
_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a model's code into a folder of the user's before it runs it: not in a test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there as soon as the model's code was run."""
    return tmp_path / "was-run"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, mark: Path) -> Path:
    """The tiny model as an architecture that transformers does not know."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "modeling_own.py").write_text(_CODE.format(mark=str(mark)))
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    return make_text(tmp_path / "calibration.txt", seed=5)


def measure(model: Path, text: Path, *flags: str) -> float:
    out = model.parent / f"{model.name}.json"
    assert (
        main(["evaluate", str(model), "--text", str(text), "--seqlen", "32", "--local", "--json", str(out), *flags])
        == 0
    )
    return float(json.loads(out.read_text())["perplexity"])


@pytest.mark.parametrize("stored", ["dense", "compressed"])
def test_it_is_not_run_unasked(
    stored: str, model: Path, text: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if stored == "compressed":
        assert main(["compress", str(model), str(tmp_path / "out"), "--local", "--bits", "4", *QK]) == 0
        model = tmp_path / "out"
    capsys.readouterr()
    assert main(["evaluate", str(model), "--text", str(text), "--seqlen", "32", "--local"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "add --trust-remote-code" in error
    assert not mark.exists()


def test_a_calibration_does_not_run_it_unasked(
    model: Path, calibration: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--local",
        "--preset",
        "best",
        "--bits",
        "3",
        "--calibration",
        str(calibration),
        "--calibration-seqlen",
        "32",
        *QK,
    ]
    assert main(["compress", str(model), str(tmp_path / "out"), "--calibration-windows", "4", *flags]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not mark.exists()


def test_a_trusted_model_is_measured_as_any_other(model: Path, tiny_model: Path, text: Path) -> None:
    assert measure(model, text, "--trust-remote-code") == measure(tiny_model, text)


def test_a_trusted_model_is_calibrated_tuned_and_measured_as_any_other(
    model: Path, tiny_model: Path, text: Path, calibration: Path, tmp_path: Path
) -> None:
    flags = ["--local", "--preset", "best", "--tune", "1", "--bits", "3", "--calibration", str(calibration)]
    flags += ["--calibration-windows", "4", "--calibration-seqlen", "32", *QK]
    own, known = tmp_path / "own" / "out", tmp_path / "known" / "out"
    assert (
        main(["compress", str(model), str(own), *flags, "--trust-remote-code", "--text", str(text), "--seqlen", "32"])
        == 0
    )
    assert main(["compress", str(tiny_model), str(known), *flags]) == 0
    assert (own / "modeling_own.py").read_bytes() == (model / "modeling_own.py").read_bytes()
    assert measure(own, text, "--trust-remote-code") == measure(known, text)


def test_a_sweep_trusts_for_calibration_and_evaluations_alike(
    model: Path, text: Path, calibration: Path, tmp_path: Path, mark: Path
) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "calibration_windows: 4\ncalibration_seqlen: 32\n"
        "evaluations: [{text: here, seqlen: 32}]\n"
        "variants: [{name: best, preset: best, tune: 0, bits: 3, include: q_proj|k_proj}]\n"
    )
    command = [
        "sweep",
        str(config),
        "--model",
        str(model),
        "--text",
        str(text),
        "--calibration",
        str(calibration),
        "--local",
    ]
    assert main([*command, "--out", str(tmp_path / "refused")]) == 2
    assert not mark.exists()
    assert main([*command, "--out", str(tmp_path / "results"), "--trust-remote-code"]) == 0


def test_other_code_makes_it_another_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(model), str(tmp_path / "out"), "--local", "--bits", "4", *QK]
    assert main(command) == 0
    with (model / "modeling_own.py").open("a") as code:
        code.write("# changed\n")
    assert main(command) == 2
    assert "source" in capsys.readouterr().err


def test_code_that_predicts_no_tokens_is_none_to_compare_with(model: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]["AutoModelForCausalLM"]  # as for embedding models
    (model / "config.json").write_text(json.dumps(config))
    trusted = ["--local", "--trust-remote-code"]
    assert main(["compress", str(model), str(tmp_path / "out"), "--bits", "4", *QK, *trusted]) == 0
    assert main(["evaluate", str(model), "--text", str(text), "--seqlen", "32", *trusted]) == 2
