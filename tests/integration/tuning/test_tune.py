"""Tuning a real (tiny) compressed model, in the plain loop.

It helps, it resumes, it is taken back when it does not help.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.cli import main
from pipeline.engine import local_pool
from pipeline.engine.task import JobContext
from pipeline.models.stored_model import open_model
from pipeline.tuning import steps as tuning_steps
from pipeline.tuning import windows as tuning_windows
from pipeline.tuning.job import TuneStep
from pipeline.tuning.tuner import TuneKey, Tuner
from tests.support.families import FamilyModel
from tests.support.tiny import contents, make_text

FLAGS = ["--local", "--calibration-windows", "32", "--calibration-seqlen", "32", "--clusters", "16", "--rank", "2"]
FLAGS += ["--segment-size", "4", "--scaled", "--centroid-bits", "8", "--factor-bits", "8", "--projectors", "q,k,v,down"]


@pytest.fixture(scope="module", autouse=True)
def short_steps() -> Iterator[None]:
    """Two windows a step, and long ones: the texts here are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning_windows, "_STEP_TOKENS", 64)
        patch.setattr(tuning_steps, "_RATE", 0.02)
        yield


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("calibration") / "calibration.txt", 2000, seed=77)


def compress(model: Path, output: Path, text: Path, *flags: str) -> dict[str, Any]:
    assert main(["compress", str(model), str(output), "--calibration", str(text), *FLAGS, *flags]) == 0
    return json.loads((output / "swsc_report.json").read_text())


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "out"
    compress(tiny_model, output, calibration, "--tune", "2")
    return output


def staging(output: Path, kind: str = "untuned") -> Path:
    (found,) = (output.parent / ".swsc-cache").glob(f"{kind}-*")
    return found


def test_it_lowers_the_divergence_on_windows_that_were_held_out(tuned: Path) -> None:
    report = json.loads((tuned / "swsc_report.json").read_text())
    about = report["tuning"]
    assert about["divergence_after"] < 0.99 * about["divergence_before"]
    assert about["steps"] == 28


def test_it_changes_values_and_nothing_else(tuned: Path) -> None:
    before, after = open_model(str(staging(tuned))), open_model(str(tuned))
    assert before.entries == after.entries
    changed = set()
    for name in after.entries:
        old, new = before.read_parts(name), after.read_parts(name)
        assert torch.equal(old["labels"], new["labels"])
        assert {part: t.dtype for part, t in old.items()} == {part: t.dtype for part, t in new.items()}
        changed |= {part for part in old if not torch.equal(old[part], new[part])}
    assert changed >= {"weight", "scales", "left", "right"}
    sizes = [sum(p.stat().st_size for p in place.glob("*.safetensors")) for place in (staging(tuned), tuned)]
    assert sizes[0] == sizes[1]


def test_the_report_measures_the_output(tiny_model: Path, tuned: Path) -> None:
    source, model = open_model(str(tiny_model)), open_model(str(tuned))
    for row in json.loads((tuned / "swsc_report.json").read_text())["tensors"]:
        if row["action"] == "compressed":
            dense, found = source.read(row["name"]).double(), model.read(row["name"]).double()
            error = float((dense - found).square().sum() / dense.square().sum())
            assert row["relative_error"] == pytest.approx(error, rel=1e-9)


def test_the_gradient_is_that_of_a_small_move(tiny_model: Path, tuned: Path) -> None:
    """In float32, along the gradient of one matrix' scales, against the divergence itself."""
    tuner = Tuner(TuneKey(str(tiny_model), str(staging(tuned)), "float32"), "cpu")
    windows = np.arange(24)[None] % 250
    tuner.load_weights(1)
    base, gradients = tuner.gradients(windows)
    assert base == pytest.approx(tuner.divergence(windows), rel=1e-5)
    name = next(iter(gradients))
    gradient = gradients[name]["scales"]
    unit = tuner.matrices.stored_values()[name]["scales"]
    move = 1e-2 * (gradient * unit).sign() * unit
    weight, tunable = tuner._student.get_parameter(name), tuner.matrices._tunables[name]

    def at(factor: float) -> float:
        values = tuner.matrices.stored_values()[name]
        with torch.no_grad():
            weight.copy_(tunable.restored({**values, "scales": values["scales"] + factor * move}))
        return tuner.divergence(windows)

    assert (at(1) - at(-1)) / 2 == pytest.approx(float((gradient * move).sum()), rel=0.02)


@pytest.fixture(scope="module")
def seeing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vision tower no text runs through."""
    model = FamilyModel("llava", tmp_path_factory.mktemp("llava"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model.dense / file).write_bytes((tiny_model / file).read_bytes())
    return model.dense


def test_matrices_that_no_text_reaches_are_tuned_among_others_with_a_gradient_of_zero(
    seeing: Path, calibration: Path, tmp_path: Path
) -> None:
    report = compress(seeing, tmp_path / "out", calibration, "--include", "vision.*q_proj", "--tune", "1")
    assert report["tuning"]["applied"]
    tuner = Tuner(TuneKey(str(seeing), str(staging(tmp_path / "out")), "float32"), "cpu")
    gradients = tuner.gradients(np.arange(24)[None])[1]
    still = {name for name, own in gradients.items() if not any(value.any() for value in own.values())}
    assert still == {"vision_tower.encoder.layers.0.self_attn.q_proj.weight"}
    assert gradients.keys() == tuner.matrices.stored_values().keys()


def test_a_tuning_that_text_cannot_reach_is_refused_and_leaves_nothing(
    seeing: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(seeing), str(tmp_path / "out"), "--calibration", str(calibration), *FLAGS[:-2]]
    assert main([*argv, "--include", "vision.*q_proj", "--tune", "1"]) == 2
    assert "--tune" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_tuning_that_was_cut_short_goes_on_to_the_same_bytes(
    tiny_model: Path, calibration: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_steps, "_STATE_INTERVAL", 2)
    real, steps = TuneStep.run, []

    def failing(self: TuneStep, context: JobContext) -> Any:
        steps.append(self.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self, context)

    monkeypatch.setattr(TuneStep, "run", failing)
    output = tmp_path / "out"
    argv = ["compress", str(tiny_model), str(output), "--calibration", str(calibration), *FLAGS, "--tune", "2"]
    assert main(argv) == 130
    assert not (output / "config.json").exists()
    assert main(argv) == 0
    assert steps[:5] == [1, 2, 3, 4, 3]  # the state after step 2 was kept
    assert contents(output) == contents(tuned)
    assert [p.name for p in staging(output, "tuned").glob("state-*")] == [f"state-{steps[-1]:05d}.safetensors"]


def test_a_tuning_that_does_not_help_is_not_applied(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_steps, "_RATE", 3.0)
    report = compress(tiny_model, tmp_path / "out", calibration, "--tune", "1")
    assert report["tuning"]["divergence_after"] >= report["tuning"]["divergence_before"]
    before, after = contents(staging(tmp_path / "out")), contents(tmp_path / "out")
    assert {name: data for name, data in before.items() if name.startswith("model-")} == {
        name: data for name, data in after.items() if name.startswith("model-")
    }


def test_a_finished_tuning_is_found_again(
    tiny_model: Path, calibration: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run with the same cache into another directory, dense this time; and the same output again does nothing."""
    monkeypatch.delattr(TuneStep, "run")
    cache = str(tuned.parent / ".swsc-cache")
    compress(tiny_model, tmp_path / "dense", calibration, "--tune", "2", "--format", "dense", "--cache-dir", cache)
    dense, compact = open_model(str(tmp_path / "dense")), open_model(str(tuned))
    assert all(torch.equal(dense.read(name), compact.read(name)) for name in compact.entries)
    monkeypatch.setattr(local_pool, "commit", None)
    compress(tiny_model, tuned, calibration, "--tune", "2", "--cache-dir", cache)


def test_a_tuning_in_another_arithmetic_is_another_output(
    tiny_model: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(tiny_model, tmp_path / "out", calibration, "--tune", "1")
    argv = [
        "compress",
        str(tiny_model),
        str(tmp_path / "out"),
        "--calibration",
        str(calibration),
        *FLAGS,
        "--tune",
        "1",
    ]
    assert main([*argv, "--calibration-dtype", "bfloat16"]) == 2
    assert "calibration" in capsys.readouterr().err


def test_a_sweep_measures_what_compress_makes(
    tiny_model: Path, calibration: Path, text: Path, tuned: Path, tmp_path: Path
) -> None:
    shutil.copytree(tuned.parent / ".swsc-cache", tmp_path / "cache")
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"calibration: {calibration}\ncalibration_windows: 32\ncalibration_seqlen: 32\n"
        f"cache_dir: {tmp_path / 'cache'}\n"
        "variants:\n"
        "- {name: tuned, clusters: 16, rank: 2, segment_size: 4, scaled: true, centroid_bits: 8, factor_bits: 8,"
        " projectors: [q, k, v, down], tune: 2}\n"
        "- {name: not tuned, clusters: 16, rank: 2, segment_size: 4, scaled: true, centroid_bits: 8, factor_bits: 8,"
        " projectors: [q, k, v, down]}\n"
        f"evaluations:\n- {{text: {text}, seqlen: 32, windows: 4}}\n"
    )
    argv = ["sweep", str(config), "--model", str(tiny_model), "--out", str(tmp_path / "out"), "--local"]
    assert main(argv) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    evaluated = tmp_path / "evaluated.json"
    measure = ["evaluate", str(tuned), "--text", str(text), "--seqlen", "32", "--windows", "4", "--local"]
    assert main([*measure, "--json", str(evaluated)]) == 0
    assert rows["tuned"]["perplexity"] == json.loads(evaluated.read_text())["perplexity"]
    assert rows["tuned"]["bits_per_weight"] == rows["not tuned"]["bits_per_weight"]
    assert rows["tuned"]["relative_error"] != rows["not tuned"]["relative_error"]
