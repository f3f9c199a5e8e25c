"""A GGUF file as MODEL is dequantized once, cached beside the file, and named wherever its figures are printed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from tests.support.project import ROOT
from tests.support.tiny import make_text
from tests.support.tiny_gguf import make_tiny_gguf

SMALL = ("--clusters", "4", "--rank", "2", "--local")
NOTE = "the model was dequantized from type Q8_0"
KEEP = "import sys; from pipeline.checkpoints.sources.gguf import cached_checkpoint; cached_checkpoint(sys.argv[1])"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "tiny one.gguf", file_type=7)


def kept_of(file: Path) -> list[Path]:
    """Files of the cache."""
    return sorted((file.parent / ".swsc-cache").glob("*"))


def keep(*command: str, **how: object) -> "subprocess.Popen[str]":
    return subprocess.Popen([*command], cwd=ROOT, stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload]


def test_what_is_compressed_is_what_convert_makes_of_it(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(file), str(tmp_path / "out"), *SMALL]) == 0
    printed = capsys.readouterr().err
    assert f"{file}: dequantizing to bfloat16, into " in printed
    assert f"note: {file}: {NOTE}" in printed
    assert "it/s" not in printed
    assert main(["convert", str(file), str(tmp_path / "dense")]) == 0
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "other"), *SMALL]) == 0
    one, other = (json.loads((tmp_path / name / "swsc_manifest.json").read_text()) for name in ("out", "other"))
    assert one == other


def test_report_and_card_name_the_file_and_its_type_and_so_does_what_is_restored(file: Path, tmp_path: Path) -> None:
    assert main(["compress", str(file), str(tmp_path / "out"), *SMALL]) == 0
    report = json.loads((tmp_path / "out" / "swsc_report.json").read_text())
    types = {"F32": 5, "Q8_0": 16}
    assert report["dequantized_from"] == {
        "file": "tiny one.gguf", "baseline": "Q8_0", "licence": "apache-2.0", "types": types,
    }  # fmt: skip
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
    for name in ("out", "dense"):
        card = (tmp_path / name / "README.md").read_text()
        assert "\nlicense: apache-2.0\n" in card
        assert "dequantized from a GGUF file, `tiny one.gguf (Q8_0)`" in card


def test_a_plan_comes_from_its_headers_and_is_that_of_the_dequantized_model(
    file: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", str(file), "--projectors", "q,k,down", "--bits", "3", "--json"]
    assert main([*plan, str(tmp_path / "before.json")]) == 0
    assert NOTE in capsys.readouterr().err
    assert not kept_of(file)
    assert (
        main(["evaluate", str(file), "--text", str(make_text(tmp_path / "text.txt")), "--seqlen", "16", "--local"]) == 0
    )
    (kept,) = kept_of(file)
    assert main([*plan, str(tmp_path / "after.json")]) == 0
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("before.json", "after.json"))
    assert before["tensors"] == after["tensors"]
    assert before["output_bytes"] == after["output_bytes"]
    assert kept_of(file) == [kept]


def test_a_sweep_takes_it_too_and_nothing_is_dequantized_twice(file: Path, tmp_path: Path) -> None:
    make_text(tmp_path / "text.txt")
    (tmp_path / "sweep.yaml").write_text(
        f"models: [{json.dumps(str(file))}]\nvariants: [{{name: rtn, method: rtn, bits: 4}}]\n"
        f"evaluations: [{{text: {tmp_path}/text.txt, seqlen: 16, windows: 4}}]\n"
    )
    assert main(["compress", str(file), str(tmp_path / "out"), *SMALL]) == 0
    (kept,) = kept_of(file)
    made = (kept / "model.safetensors").stat().st_mtime_ns
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "results"), "--local"]) == 0
    assert (kept / "model.safetensors").stat().st_mtime_ns == made
    assert {row["model"] for row in json.loads((tmp_path / "results/results.json").read_text())["rows"]} == {str(file)}


def test_another_file_under_the_same_name_is_another_model(file: Path, tmp_path: Path) -> None:
    assert main(["compress", str(file), str(tmp_path / "out"), *SMALL]) == 0
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    assert main(["compress", str(file), str(tmp_path / "other"), *SMALL]) == 0
    assert len(kept_of(file)) == 2


def test_two_processes_at_once_make_it_once(file: Path) -> None:
    runs = [keep(sys.executable, "-c", KEEP, str(file)) for _ in range(2)]
    printed = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    (kept,) = kept_of(file)
    assert sorted(path.name for path in kept.iterdir()) == [
        ".swsc-kept.json", "config.json", "dequantized.json", "generation_config.json", "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_files_of_a_killed_process_are_written_again(file: Path, tmp_path: Path) -> None:
    assert main(["compress", str(file), str(tmp_path / "out"), *SMALL]) == 0
    (kept,) = kept_of(file)
    whole = {path.name: path.read_bytes() for path in kept.iterdir()}
    left = kept.with_name(f"{kept.name}.partial")
    (left / ".swsc").mkdir(parents=True)
    gone = keep("true")
    gone.wait()
    (left / ".swsc/lease.json").write_text(json.dumps({"owner": "x", "machine": machine(), "pid": gone.pid, "beat": 3}))
    shutil.move(kept, left / "whole")
    (left / "whole/model.safetensors").write_bytes(b"half")
    (left / "whole/model-00001-of-00002.safetensors").write_bytes(b"half")
    assert main(["compress", str(file), str(tmp_path / "other"), *SMALL]) == 0
    assert kept_of(file) == [kept]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == whole


def machine() -> str:
    from pipeline.storage.lease import machine_id  # what a lease calls this machine

    return machine_id()


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(file: Path) -> None:
    run = keep(
        "bash",
        "-c",
        f'ulimit -f 64; exec "$0" -m jobs compress "$1" "$1.out" {" ".join(SMALL)}',
        sys.executable,
        str(file),
    )
    printed = run.communicate(timeout=240)[1].strip().splitlines()
    assert run.returncode == 2
    assert printed[-1].startswith("error: ")
    assert "run the same command again" in printed[-1]
    assert not kept_of(file)


def test_a_disk_without_room_is_an_error_before_work(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    assert main(["compress", str(file), str(file.parent / "out"), *SMALL]) == 2
    assert "bytes are needed, 100 are free" in capsys.readouterr().err
    assert not kept_of(file)


@pytest.mark.parametrize("verb", ["plan", "compress", "evaluate"])
@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket/model.gguf", "copy it to a disk that all nodes see"),
        ("absent.gguf", "no such file"),
        ("foreign.gguf", "not a GGUF file"),
        ("truncated.GGUF", "cannot be read as GGUF"),
    ],
)
def test_what_cannot_be_dequantized_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, location: str,
    expected: str
) -> None:  # fmt: skip
    monkeypatch.chdir(file.parent)
    Path("foreign.gguf").write_bytes(b"pickle")
    Path("truncated.GGUF").write_bytes(file.read_bytes()[:5000])
    further = {"plan": [], "compress": ["out"], "evaluate": ["--text", str(file)]}[verb]
    assert main([verb, location, *further]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert os.path.basename(location) in error
    assert expected in error
    assert not kept_of(file)


def test_verbs_that_take_outputs_refuse_it_at_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify", str(file)], ["restore", str(file), str(file.parent / "out")]):
        assert main(command) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not kept_of(file)


@pytest.mark.parametrize("note", ["[]", "{", '{"file": "x"}', '{"file": "x", "baseline": "y", "types": 3}'])
def test_a_note_that_is_damaged_is_named(
    tiny_model: Path, tmp_path: Path, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/dequantized.json").write_text(note)
    assert main(["plan", str(tmp_path / "model"), "--clusters", "4", "--rank", "2"]) == 2
    assert "dequantized.json: not written by `swsc convert`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "dequantized.json", ".swsc-kept.json"]
)
@pytest.mark.parametrize("cut", [True, False])
def test_one_that_is_kept_and_damaged_is_made_again(file: Path, tmp_path: Path, name: str, cut: bool) -> None:
    assert main(["compress", str(file), str(tmp_path / "out"), *SMALL]) == 0
    (kept,) = kept_of(file)
    damaged = kept / name
    if cut:
        damaged.write_bytes(damaged.read_bytes()[:-9])
    else:
        damaged.unlink()
    assert main(["compress", str(file), str(tmp_path / "again"), *SMALL]) == 0
    assert kept_of(file) == [kept]
    one, other = ((tmp_path / path / "swsc_manifest.json").read_bytes() for path in ("out", "again"))
    assert one == other


def test_convert_into_a_mount_point_is_refused_before_work(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "data"))
    assert main(["convert", str(file), str(tmp_path / "data")]) == 2
    assert "mount point" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", file.name]
