"""The identity and the report of an output name device and versions; no other device resumes an unfinished one."""

import json
from pathlib import Path

import pytest
import torch

from jobs.cli import main
from tests.support.tiny import contents

ARGV = ("--bits", "4", "--local")
GPU = "NVIDIA H200"


def begun_on_a_gpu(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted before its manifest, on a device that claims to be a GPU."""

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as there:
        there.setattr("pipeline.engine.ray_backend.arithmetic.device_name", lambda device: GPU)
        there.setattr("pipeline.variants.compress.finish", cut_off)
        assert main(["compress", str(model), str(out), *ARGV]) == 130


def test_an_unfinished_output_is_not_gone_on_with_on_another_device(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    begun_on_a_gpu(tiny_model, out, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(["compress", str(tiny_model), str(out), *ARGV]) == 2
    printed = capsys.readouterr().err
    assert f"device '{GPU}' -> 'cpu'" in printed
    assert "Traceback" not in printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    with monkeypatch.context() as there:
        there.setattr("pipeline.engine.ray_backend.arithmetic.device_name", lambda device: GPU)
        assert main(["compress", str(tiny_model), str(out), *ARGV]) == 0
    assert json.loads((out / "swsc_report.json").read_text())["files_of_an_earlier_run"] > 0


def test_it_is_replaced_if_that_is_meant(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun_on_a_gpu(tiny_model, tmp_path / "out", monkeypatch)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *ARGV, "--overwrite"]) == 0
    report = json.loads((tmp_path / "out" / "swsc_report.json").read_text())
    assert report["files_of_an_earlier_run"] == 0
    assert report["arithmetic"]["device"] == "cpu"


def test_a_finished_one_is_left_alone_whatever_made_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["compress", str(tiny_model), str(out), *ARGV]) == 0
    before = contents(out)
    monkeypatch.setattr("pipeline.engine.ray_backend.arithmetic.device_name", lambda device: GPU)
    assert main(["compress", str(tiny_model), str(out), *ARGV]) == 0
    assert contents(out) == before


def test_report_and_manifest_name_device_torch_and_kernels(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *ARGV]) == 0
    about = json.loads((tmp_path / "out" / "swsc_report.json").read_text())["arithmetic"]
    assert about == {
        "threads": 1,
        "device": "cpu",
        "torch": torch.__version__.split("+")[0],
        "kernels": [torch.backends.cpu.get_cpu_capability()],
    }
    identity = json.loads((tmp_path / "out" / "swsc_manifest.json").read_text())["identity"]
    assert identity["device"] == "cpu"
    assert identity["torch"] == about["torch"]


@pytest.mark.parametrize("gpus", ["2", "1.5", "-1", "all"])
def test_a_worker_has_one_gpu_at_most(
    gpus: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--gpus-per-worker", gpus]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "gpus_per_worker" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [("--gpus-per-worker", "0.5"), ("--gpu-type", "A100")])
def test_a_gpu_that_is_asked_for_and_not_there_is_no_cpu(
    tiny_model: Path, tmp_path: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compress", str(tiny_model), str(out), *ARGV, *flags]) == 2
    message = capsys.readouterr().err
    assert flags[0] in message
    assert "GPU" in message
    assert not out.exists()
    assert main(["compress", str(tiny_model), str(out), *ARGV, "--gpus-per-worker", "0"]) == 0
