"""What a calibration, a tuning or a conversion keeps for later runs, and a sweep's settings, changed.

One line, soon, in little memory.
"""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.cli import main
from pipeline.planning import machine_speed as speed
from tests.support.bounded import ends
from tests.support.gguf_tree import changed_gguf, parsed
from tests.support.mutations import changed_header, changed_json, changed_yaml, patient
from tests.support.tiny import make_text, make_tiny_model
from tests.support.tiny_gguf import make_tiny_gguf

DATA_FREE = [
    "--local", "--preset", "data-free", "--bits", "3", "--tune", "1", "--projectors", "q", "--calibration-windows", "4",
    "--calibration-seqlen", "32",
]  # fmt: skip
KEPT = [
    "written-*.json", "moments-*/curves-*.json", "moments-*/.swsc/run.json", "moments-*/.swsc/files.json",
    "moments-*/.swsc/done/*",
    "moments-*/*.safetensors", "tuned-*/result.json", "tuned-*/.swsc/run.json", "tuned-*/.swsc/files.json",
    "tuned-*/.swsc/done/*",
    "tuned-*/*.safetensors", "untuned-*/swsc_manifest.json", "untuned-*/swsc_report.json",
    "untuned-*/swsc_calibration.json",
    "untuned-*/config.json", "untuned-*/model.safetensors.index.json", "untuned-*/tokenizer.json",
    "untuned-*/model-00002-*.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the cache of a tuned compression of it on text that it wrote."""
    folder = tmp_path_factory.mktemp("caches")
    make_tiny_model(folder / "model", layers=1)
    make_text(folder / "text.txt", 400)
    for _ in range(2):  # what was written is read again
        assert main(["compress", *_arguments(folder, "cache")]) == 0
    return folder


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the machine is, is not the matter here."""
    monkeypatch.setattr(speed, "_SIDE", 16)
    monkeypatch.setattr(speed, "_REPEATS", 1)


def _arguments(folder: Path, cache: str) -> list[str]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return [str(folder / "model"), str(folder / "out"), *DATA_FREE, "--cache-dir", str(folder / cache)]


def _changed_copy(folder: Path, data: st.DataObject, kept: str, inner: bool) -> None:
    """The cache once more, with one of its files changed; `inner`: with a tuning that resumes from its state."""
    file = _copied(folder, kept)
    whole = file.read_bytes()
    file.write_bytes(data.draw(changed_header(whole) if file.suffix == ".safetensors" else changed_json(whole)))
    for result in (folder / "changed").glob("tuned-*/result.json") if inner else ():
        result.unlink()


@patient(20)
@given(data=st.data(), kept=st.sampled_from(KEPT), inner=st.booleans())
def test_a_file_of_a_cache(folder: Path, data: st.DataObject, kept: str, inner: bool) -> None:
    _changed_copy(folder, data, kept, inner and "result" not in kept)
    ends("compress", *_arguments(folder, "changed"))


def _copied(folder: Path, kept: str) -> Path:
    """A file of the cache in a copy of it."""
    shutil.rmtree(folder / "changed", ignore_errors=True)
    shutil.copytree(folder / "cache", folder / "changed")
    (file,) = (folder / "changed").glob(kept)
    return file


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_clusters", 16.0), ("n_clusters", None), ("n_clusters", -1), ("segment_size", "8"), ("rank", "x"),
     ("scaled", 1), ("method", "y"),
     ("share", 10**400), ("share", True), ("share", "1.5"), ("reach", 10**400), ("reach", float("nan")), ("spec", None),
     ("specs", [])],
)  # fmt: skip
def test_curves_of_no_spec_on_the_menu(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    file = _copied(folder, "moments-*/curves-*.json")
    curves = json.loads(file.read_text())
    ((matrix, _),) = curves["reach"].items()
    ((kind, specs),) = curves["shares"].items()
    if key == "reach":
        curves["reach"][matrix] = value
    elif key == "specs":
        curves["shares"][kind] = value
    elif key in ("spec", "share"):
        specs[0][key == "share"] = value
    else:
        specs[0][0][key] = value
    file.write_text(json.dumps(curves))
    assert ends("compress", *_arguments(folder, "changed")) == 2
    assert f"{file.name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["shape", "bytes"])
def test_a_state_of_a_finished_tuning_that_was_changed(
    folder: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    """Its header has another shape, or one of its bytes differs."""
    file = _copied(folder, "tuned-*/*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])
    if message == "shape":
        about[max(about)]["shape"].append(1)
    header = json.dumps(about).encode()
    content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    file.write_bytes(content if message == "shape" else content[:-1] + bytes([content[-1] ^ 1]))
    assert ends("compress", *_arguments(folder, "changed")) == 2
    assert f"{file.parent.name}: {file.name}" in capsys.readouterr().err


@patient(10)
@given(
    data=st.data(), name=st.sampled_from(["dequantized.json", "config.json", "model.safetensors"]), beside=st.booleans()
)
def test_what_a_gguf_file_was_made_into(folder: Path, data: st.DataObject, name: str, beside: bool) -> None:
    """The checkpoint, and its note of what it was made of.

    Where the user wrote it, or beside the file, where a plan finds it.
    """
    file = folder / "a" / "whole.gguf"
    if not file.exists():
        file.parent.mkdir()
        assert main(["convert", str(make_tiny_gguf(file)), str(folder / "made")]) == 0
        assert (
            main(["compress", str(file), str(folder / "of-gguf"), "--local", "--projectors", "q", "--bits", "4"]) == 0
        )
    (kept,) = (folder / "a" / ".swsc-cache").glob("gguf-*")
    changed = (kept if beside else folder / "made") / name
    whole = changed.read_bytes()
    try:
        changed.write_bytes(data.draw(changed_header(whole) if name == "model.safetensors" else changed_json(whole)))
        ends("plan", str(file if beside else folder / "made"), "--local", "--projectors", "q")
    finally:
        changed.write_bytes(whole)


@patient(10)
@given(data=st.data())
def test_a_gguf_file_that_is_converted(folder: Path, data: st.DataObject) -> None:
    whole = folder / "b.gguf"
    if not whole.exists():
        make_tiny_gguf(whole)
    (folder / "changed.gguf").write_bytes(data.draw(changed_gguf(parsed(whole.read_bytes()))))
    shutil.rmtree(folder / "converted", ignore_errors=True)
    ends("convert", str(folder / "changed.gguf"), str(folder / "converted"))


@patient(12)
@given(
    data=st.data(),
    name=st.sampled_from(
        ["config.json", "model.safetensors.index.json", "swsc_manifest.json", "model-00002-of-00003.safetensors"]
    ),
)
def test_files_of_an_output_that_is_restored(folder: Path, data: st.DataObject, name: str) -> None:
    (whole,) = (folder / "cache").glob("untuned-*")
    shutil.rmtree(folder / "output", ignore_errors=True)
    shutil.rmtree(folder / "restored", ignore_errors=True)
    shutil.copytree(whole, folder / "output")
    content = (whole / name).read_bytes()
    changed = changed_header(content) if name.endswith(".safetensors") else changed_json(content)
    (folder / "output" / name).write_bytes(data.draw(changed))
    ends("restore", str(folder / "output"), str(folder / "restored"), "--local")


@patient(15)
@given(data=st.data())
def test_headers_of_a_model(folder: Path, data: st.DataObject) -> None:
    """The JSON in front of the tensors of a safetensors file."""
    shutil.rmtree(folder / "headers", ignore_errors=True)
    shutil.copytree(folder / "model", folder / "headers")
    file = sorted((folder / "headers").glob("*.safetensors"))[data.draw(st.integers(0, 1))]
    file.write_bytes(data.draw(changed_header(file.read_bytes())))
    ends("plan", str(folder / "headers"), "--local", "--projectors", "q")


@patient(10)
@given(data=st.data())
def test_settings_of_a_sweep(folder: Path, data: st.DataObject) -> None:
    settings = {
        "models": [str(folder / "model")],
        "variants": [{"name": "q", "projectors": "q", "bits": 4}, {"name": "k", "projectors": "k"}],
        "evaluations": [{"text": str(folder / "text.txt"), "seqlen": 32, "windows": 2}], "uncompressed": False,
        "reference": {str(folder / "model"): 3.5},
    }  # fmt: skip
    (folder / "sweep.yaml").write_bytes(data.draw(changed_yaml(settings)))
    shutil.rmtree(folder / "swept", ignore_errors=True)
    ends("sweep", str(folder / "sweep.yaml"), "--out", str(folder / "swept"), "--local")
