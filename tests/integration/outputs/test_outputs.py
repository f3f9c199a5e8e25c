"""Outputs after a run, or with two concurrent runs: verify, overwrite, a second run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST, RUN
from pipeline.engine.task import JobContext
from pipeline.errors import CheckpointError
from pipeline.restoring.job import RestoreTensors
from pipeline.storage.store import Store
from tests.support.commands import compress
from tests.support.tiny import contents, make_text, make_tiny_model


def first_layer(output: Path) -> Path:
    return output / json.loads((output / "model.safetensors.index.json").read_text())["weight_map"][QUERY]


QUERY = "model.layers.0.self_attn.q_proj.labels"


class TestVerify:
    """Every kind of damage is named, down to the tensor."""

    def test_a_complete_output_and_a_restored_one_verify(
        self, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["restore", str(output), str(tmp_path / "dense"), "--local"]) == 0
        capsys.readouterr()
        for place in (output, tmp_path / "dense"):
            assert main(["verify", str(place), "--local"]) == 0
            size = sum(len(data) for name, data in contents(place).items() if name != MANIFEST)
            assert f"{size:,} bytes, " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda out: first_layer(out).unlink(), "is missing"),
            (lambda out: _append(first_layer(out), b"!"), "bytes, expected"),
            (lambda out: _append(first_layer(out), None), "bytes, expected"),
            (lambda out: _flip(first_layer(out), QUERY), f"{QUERY} differs"),
            (lambda out: _flip(first_layer(out), ""), "header differs"),
            (lambda out: _flip(out / "config.json", None), "config.json: content differs"),
            (lambda out: (out / "extra.safetensors").write_bytes(b""), "extra.safetensors is not one of its files"),
            (lambda out: (out / "swsc_report.json").unlink(), "swsc_report.json is missing"),
            (lambda out: (out / "swsc_report.json").write_text("[]"), "swsc_report.json is missing or"),
            (lambda out: (out / MANIFEST).write_text("{"), "swsc_manifest.json is damaged"),
            (lambda out: (out / MANIFEST).write_text('{"files": {"a": {}}}'), "swsc_manifest.json is damaged"),
        ],
    )
    def test_damage_is_named(
        self, output: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
    ) -> None:
        damage(output)
        assert main(["verify", str(output), "--local"]) == 1
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("verify:")]
        assert len(error) == 1
        assert error[0].startswith("error: ")
        assert message in error[0]

    @pytest.mark.parametrize(
        "name", ["more.txt", "more", "more.safetensors", "gone", "config.json", "swsc_report.json", MANIFEST]
    )
    def test_what_somebody_put_there_is_named_with_a_remedy_that_helps(
        self, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        own = (output / name).exists()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes((output / name).read_bytes()) if own else elsewhere.mkdir()
        (output / name).unlink(missing_ok=True)
        (output / name).symlink_to(elsewhere if name != "gone" else tmp_path / "nothing")
        if name.endswith("safetensors"):
            (output / name).unlink()
            (output / name).write_bytes(b"")
        assert main(["verify", str(output), "--local"]) == 1
        message = capsys.readouterr().err
        assert name in message
        assert "--overwrite" not in message
        (output / name).unlink()  # the remedy of the error
        if own:
            (output / name).write_bytes(elsewhere.read_bytes())
        assert main(["verify", str(output), "--local"]) == 0

    def test_what_is_no_finished_output_is_a_mistake(
        self, tiny_model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify", str(tiny_model), "--local"]) == 2
        assert "no swsc_manifest.json" in capsys.readouterr().err

    def test_evaluation_verifies_first_with_the_flag(
        self, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _flip(first_layer(output), QUERY)
        text = str(make_text(tmp_path / "text.txt"))
        flags = ["evaluate", str(output), "--local", "--seqlen", "64", "--windows", "2", "--text", text]
        assert main([*flags, "--verify"]) == 1
        assert f"{QUERY} differs" in capsys.readouterr().err


def _append(path: Path, data: bytes | None) -> None:
    path.write_bytes(path.read_bytes()[:-1] if data is None else path.read_bytes() + data)


def _flip(path: Path, tensor: str | None) -> None:
    """Change one bit in the first byte of a tensor, in a header name (""), or in the last byte but one (None)."""
    data = bytearray(path.read_bytes())
    place = len(data) - 2
    if tensor is not None:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        place = 8 + length + header[tensor]["data_offsets"][0] if tensor else data.index(b"labels")
    data[place] ^= 1
    path.write_bytes(data)


class TestOverwrite:
    """--overwrite replaces an existing output, and never leaves a mixture of both."""

    def test_other_settings_are_refused_with_the_remedy_and_replaced_with_overwrite(
        self, tiny_model: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = contents(output)
        assert compress(tiny_model, output, "--bits", "5") == 2
        assert "--overwrite" in capsys.readouterr().err
        assert contents(output) == before
        assert compress(tiny_model, output, "--bits", "5", "--overwrite") == 0
        assert compress(tiny_model, tmp_path / "straight", "--bits", "5") == 0
        assert contents(output) == contents(tmp_path / "straight")
        assert not (output / ".swsc").exists()

    def test_files_that_the_new_output_has_not_go_with_the_old_one(self, output: Path, tmp_path: Path) -> None:
        larger = make_tiny_model(tmp_path / "larger", layers=6)
        (larger / "notes.txt").write_text("of the larger model")
        assert compress(larger, tmp_path / "there") == 0
        smaller = make_tiny_model(tmp_path / "smaller", layers=2)
        assert compress(smaller, tmp_path / "there", "--overwrite") == 0
        assert compress(smaller, tmp_path / "straight") == 0
        assert contents(tmp_path / "there") == contents(tmp_path / "straight")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda out: first_layer(out).unlink(),
            lambda out: _flip(first_layer(out), QUERY),
            lambda out: (out / "swsc_report.json").unlink(),
            lambda out: (out / "swsc_report.json").write_text("{"),
            lambda out: (out / MANIFEST).write_text("{"),
        ],
    )
    def test_a_damaged_output_is_refused_and_recomputed_with_overwrite(
        self, tiny_model: Path, output: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
    ) -> None:
        whole = contents(output)
        damage(output)
        assert compress(tiny_model, output) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert compress(tiny_model, output, "--overwrite") == 0
        assert contents(output) == whole
        assert main(["verify", str(output), "--local"]) == 0

    def test_files_of_a_run_that_was_cut_off_at_its_end_do_not_stay_in_another_one(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
        (other / "chat_template.jinja").write_text("of the other model")
        real = Store.write

        def write(self: Store, name: str, pieces: object) -> object:
            if name == MANIFEST:
                raise KeyboardInterrupt
            return real(self, name, pieces)  # type: ignore[arg-type]

        monkeypatch.setattr(Store, "write", write)
        assert compress(other, tmp_path / "out") == 130
        monkeypatch.undo()
        assert (tmp_path / "out" / "chat_template.jinja").exists()
        assert compress(tiny_model, tmp_path / "out", "--overwrite") == 0
        assert not (tmp_path / "out" / "chat_template.jinja").exists()

    def test_what_is_no_part_of_a_model_is_not_copied(self, tiny_model: Path, tmp_path: Path) -> None:
        model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
        (model / "tokenizer.json.partial").write_text("of a download that was cut off")
        assert compress(model, tmp_path / "out") == 0
        assert main(["verify", str(tmp_path / "out"), "--local"]) == 0
        assert not list((tmp_path / "out").glob("*.partial"))

    def test_a_run_whose_notes_are_damaged_is_begun_again(
        self, tiny_model: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "begun" / ".swsc").mkdir(parents=True)
        (tmp_path / "begun" / RUN).write_text("{")
        assert compress(tiny_model, tmp_path / "begun") == 2
        assert "run.json is damaged" in capsys.readouterr().err
        assert compress(tiny_model, tmp_path / "begun", "--overwrite") == 0
        assert contents(tmp_path / "begun") == contents(output)

    def test_a_false_manifest_causes_no_removal_of_foreign_files(self, tiny_model: Path, output: Path) -> None:
        (output / "mine").mkdir()
        (output / "mine" / "thesis.tex").write_text("three years of work")
        manifest = json.loads((output / MANIFEST).read_text())
        manifest["files"] |= {key: {"size": 0, "sha256": ""} for key in [".", "mine", "mine/thesis.tex", "../out", "/"]}
        (output / MANIFEST).write_text(json.dumps(manifest))
        assert compress(tiny_model, output, "--bits", "5", "--overwrite") == 0
        assert (output / "mine" / "thesis.tex").read_text() == "three years of work"

    def test_the_same_output_is_left_alone(self, tiny_model: Path, output: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
        assert compress(tiny_model, output, "--overwrite") == 0
        assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    def test_what_is_not_ours_is_never_replaced(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("three years of work")
        assert compress(tiny_model, tmp_path, "--overwrite") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_one_that_is_cut_off_at_any_write_ends_as_if_nothing_had_happened(
        self, tiny_model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert compress(tiny_model, tmp_path / "straight", "--bits", "5") == 0
        real, at = Store.write, 0

        def write(self: Store, name: str, pieces: object) -> object:
            nonlocal at
            at -= 1
            if at == 0:
                raise KeyboardInterrupt
            return real(self, name, pieces)  # type: ignore[arg-type]

        for last in range(1, 40):
            place = Path(shutil.copytree(made, tmp_path / f"out{last}"))
            at = last
            with monkeypatch.context() as patch:
                patch.setattr(Store, "write", write)
                code = compress(tiny_model, place, "--bits", "5", "--overwrite")
            if code == 0:
                break
            assert code == 130
            assert not (place / MANIFEST).exists() or main(["verify", str(place), "--local"]) == 0
            assert compress(tiny_model, place, "--bits", "5", "--overwrite") == 0
            assert contents(place) == contents(tmp_path / "straight")
        assert 20 < last < 39


def test_a_node_that_does_not_see_the_model_does_not_take_away_what_others_restored(
    tiny_model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["restore", str(output), str(tmp_path / "straight"), "--local"]) == 0
    real, calls = RestoreTensors.run, []

    def restore(self: RestoreTensors, context: JobContext) -> object:
        calls.append(self.names)
        if len(calls) == 2:
            raise CheckpointError(f"{self.location}: no such directory")
        return real(self, context)

    monkeypatch.setattr(RestoreTensors, "run", restore)
    assert main(["restore", str(output), str(tmp_path / "dense"), "--local"]) == 2
    monkeypatch.undo()
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == 1
    assert main(["restore", str(output), str(tmp_path / "dense"), "--local"]) == 0
    assert contents(tmp_path / "dense") == contents(tmp_path / "straight")


def test_restoring_verifies_first_with_the_flag(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip(first_layer(output), QUERY)
    assert main(["restore", str(output), str(tmp_path / "dense"), "--local", "--verify"]) == 1
    assert f"{QUERY} differs" in capsys.readouterr().err
    assert not (tmp_path / "dense").exists()


def test_a_mistake_about_the_output_shows_before_the_calibration(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(make_text(tmp_path / "text.txt"))
    flags = ["--preset", "best", "--bits", "3", "--calibration", text, "--calibration-windows", "4"]
    flags += ["--calibration-seqlen", "32"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("three years of work")
    assert compress(tiny_model, tmp_path / "made") == 0
    for place, message in [("full", "not empty and not an output"), ("made", "--overwrite")]:
        capsys.readouterr()
        assert compress(tiny_model, tmp_path / place, *flags) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "calibrate" not in error
    assert not (tmp_path / ".swsc-cache").exists()


def test_a_run_that_would_touch_too_little_is_refused_before_it_begins(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(tiny_model, tmp_path / "out", "--require-coverage", "0.5") == 2
    assert "require_coverage 0.5: 0.1691 of the weights are selected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert compress(tiny_model, tmp_path / "out", "--require-coverage", "0.15") == 0
    assert main(["plan", str(tiny_model), "--require-coverage", "0.5"]) == 2
