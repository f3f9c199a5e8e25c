"""Whatever a small file contains, a verb ends with 0, 1 or 2 and one line: no traceback, not 5 seconds, not 300 MB.

pytest tests/integration/checkpoints/test_mutations.py --hypothesis-profile thorough       10,000 of each
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.cli import main
from pipeline.errors import ConfigError
from pipeline.planning import machine_speed as speed
from pipeline.storage import lease
from tests.support.bounded import MAX_BYTES, bounded, ends
from tests.support.gguf_tree import Array, changed_gguf, parsed, written
from tests.support.mutations import changed_bytes, changed_json, changed_yaml, patient
from tests.support.tiny import make_text, make_tiny_model
from tests.support.tiny_gguf import make_tiny_gguf

QK = ["--projectors", "q,k", "--clusters", "8", "--rank", "2", "--local"]
CONFIG = {"preset": "paper", "projectors": ["q", "k"], "clusters": 8, "rank": 2, "storage-dtype": "float16", "seed": 3}
CARD = {
    "license": "mit", "language": ["en", "de"], "pipeline_tag": "text-generation", "base_model": "org/name",
    "model-index": [{"name": "x", "results": [{"task": {"type": "text-generation"}, "metrics": [{"value": 3.5}]}]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and an output that was calibrated."""
    folder = tmp_path_factory.mktemp("mutations")
    make_tiny_model(folder / "model", layers=1)
    make_text(folder / "text.txt", 400)
    assert main(["compress", str(folder / "model"), str(folder / "out"), *QK]) == 0
    return folder


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that names another machine is waited for, and the machine's speed is measured.

    How long is not the matter here.
    """
    monkeypatch.setattr(lease, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_SIDE", 16)
    monkeypatch.setattr(speed, "_REPEATS", 1)


@contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """The file with another content, as long as the context lasts."""
    before = file.read_bytes() if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        if before is not None:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts the peak of a block")
def test_bounds_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what an earlier one took; and a call that sleeps takes time, too."""
    b"\1" * (MAX_BYTES + (100 << 20))
    with pytest.raises(AssertionError, match="MiB"), bounded():
        b"\1" * (MAX_BYTES + (10 << 20))
    with bounded():
        b"\1" * (MAX_BYTES // 2)
    monkeypatch.setattr("tests.support.bounded.MAX_SECONDS", 0.01)
    with pytest.raises(AssertionError, match=r"0\.. s"), bounded():
        time.sleep(0.1)


@patient()
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_of_a_model(folder: Path, data: st.DataObject, name: str) -> None:
    file = folder / "model" / name
    flags = data.draw(st.sampled_from([QK, ["--include", "q_proj", "--local"]]))  # roles need a family that is known
    with replaced(file, data.draw(changed_json(file.read_bytes()))):
        ends("plan", str(folder / "model"), *flags)


@patient()
@given(data=st.data())
@pytest.mark.parametrize("verb", ["verify", "compress", "overwrite"])
@pytest.mark.parametrize("name", ["swsc_manifest.json", "swsc_report.json"])
def test_manifest_and_report_of_an_output(folder: Path, data: st.DataObject, name: str, verb: str) -> None:
    out = folder / f"out-{verb}"
    if not out.exists():
        shutil.copytree(folder / "out", out)
    compress = ["compress", str(folder / "model"), str(out), *QK]
    argv = {"verify": ["verify", str(out), "--local"], "compress": compress, "overwrite": [*compress, "--overwrite"]}
    whole = (folder / "out" / name).read_bytes()
    changed = data.draw(changed_json(whole))
    with replaced(out / name, changed):
        code = ends(*argv[verb])
        if verb == "overwrite":
            assert code == 0 or (code == 2 and _lists_less(changed, whole)), "--overwrite mends whatever is damaged"
            assert code or main(["verify", str(out), "--local"]) == 0


def _lists_less(changed: bytes, whole: bytes) -> bool:
    """Whether a manifest lists files, but not all: the others are taken for the user's, and are not replaced."""
    try:
        return not set(json.loads(whole)["files"]) <= set(dict(json.loads(changed)["files"]))
    except (ValueError, KeyError, TypeError):
        return False


@patient()
@given(data=st.data())
@pytest.mark.parametrize("name", ["run.json", "lease.json", "finishing.json", "replaced.json", "done"])
def test_state_of_a_run(folder: Path, data: st.DataObject, name: str) -> None:
    """Of a run that was cut off when one file was finished."""
    out = folder / "cut"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(_cut(folder), out)
    file = next((out / ".swsc" / "done").iterdir()) if name == "done" else out / ".swsc" / name
    whole = {"lease.json": f'{{"owner": "x", "machine": "{lease.machine_id()}", "pid": 999999, "beat": 1}}'}
    content = file.read_bytes() if file.exists() else whole.get(name, '["a.json", "README.md"]').encode()
    file.write_bytes(data.draw(changed_json(content)))
    ends("compress", str(folder / "model"), str(out), *QK)


@pytest.mark.parametrize("rows", ["none", "another"])
def test_a_file_whose_record_lacks_a_matrix_is_written_again(folder: Path, rows: str) -> None:
    out = folder / "cut"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(_cut(folder), out)
    for file in (out / ".swsc" / "done").iterdir():
        record = json.loads(file.read_bytes())
        changed = [] if rows == "none" else [{**row, "name": "another"} for row in record["rows"]]
        file.write_text(json.dumps({**record, "rows": changed}))
    assert main(["compress", str(folder / "model"), str(out), *QK]) == 0
    assert (out / "config.json").read_bytes() == (folder / "out" / "config.json").read_bytes()
    names = [file.name for file in (folder / "out").glob("*.safetensors")]
    assert names
    assert all((out / name).read_bytes() == (folder / "out" / name).read_bytes() for name in names)


def _cut(folder: Path) -> Path:
    """An output as a run leaves it that is killed before its index is written."""
    from unittest import mock

    out = folder / "cut-off"
    if not out.exists():
        with mock.patch("pipeline.variants.compress.finish", side_effect=KeyboardInterrupt):
            assert main(["compress", str(folder / "model"), str(out), *QK]) == 130
    return out


@patient()
@given(data=st.data())
def test_settings_in_a_file(folder: Path, data: st.DataObject) -> None:
    with replaced(folder / "config.yaml", data.draw(changed_yaml(CONFIG))):
        ends("plan", str(folder / "model"), "--config", str(folder / "config.yaml"), "--local")


@patient()
@given(data=st.data())
def test_the_card_of_a_model(folder: Path, data: st.DataObject) -> None:
    from pipeline.checkpoints.source import open_checkpoint
    from pipeline.outputs.model_card import read_source_card

    content = data.draw(changed_yaml(CARD))
    with replaced(folder / "model" / "README.md", b"---\n" + content + b"---\n# Tiny\n"), bounded():
        read_source_card(open_checkpoint(str(folder / "model")))


@patient()
@given(data=st.data())
def test_a_gguf_file(folder: Path, data: st.DataObject) -> None:
    whole = folder / "whole.gguf"
    if not whole.exists():
        make_tiny_gguf(whole)
    content = whole.read_bytes()
    changed = st.one_of(changed_gguf(parsed(content)), changed_gguf(parsed(content)), changed_bytes(content, 4500))
    (folder / "changed.gguf").write_bytes(data.draw(changed))
    ends("plan", str(folder / "changed.gguf"), "--include", "q_proj", "--local")


@patient(12)
@given(data=st.data())
@pytest.mark.parametrize(
    "name",
    ["swsc_calibration.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "config.json"],
)
def test_files_that_an_evaluation_reads(folder: Path, data: st.DataObject, name: str) -> None:
    file = folder / "out" / name
    content = file.read_bytes() if file.exists() else b'{"text": "a.txt", "traces": ["0011223344556677"]}'
    with replaced(file, data.draw(changed_json(content))):
        ends(
            "evaluate",
            str(folder / "out"),
            "--text",
            str(folder / "text.txt"),
            "--seqlen",
            "32",
            "--windows",
            "2",
            "--local",
        )


@patient(12)
@given(data=st.data())
@pytest.mark.parametrize("name", [".swsc/amending.json", "swsc_manifest.json"])
def test_files_that_a_card_is_written_by(folder: Path, data: st.DataObject, name: str) -> None:
    out = folder / "carded"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "out", out)
    manifest = (out / "swsc_manifest.json").read_text()
    content = (
        manifest if name == "swsc_manifest.json" else f'{{"README.md": "# New", "swsc_manifest.json": {manifest}}}'
    )
    (out / ".swsc").mkdir()
    (out / name).write_bytes(data.draw(changed_json(content.encode())))
    flags = ["--text", str(folder / "text.txt"), "--seqlen", "32", "--windows", "2", "--local", "--card"]
    ends("evaluate", str(out), *flags)


@patient()
@given(data=st.data())
def test_a_result_that_stands_beside_another(folder: Path, data: st.DataObject) -> None:
    from pipeline.outputs.card_content import read_result

    whole = b'{"perplexity": 12.5, "text_sha256": "00", "seqlen": 32, "windows": 2, "bos": "none", "dtype": "float32"}'
    with replaced(folder / "result.json", data.draw(changed_json(whole))), contextlib.suppress(ConfigError):
        assert math.isfinite(read_result(str(folder / "result.json"))["perplexity"])


@pytest.mark.parametrize("key", ["general.file_type", "general.license"])
@pytest.mark.parametrize(
    "value", [Array(4, [1]), Array(4, []), Array(8, ["a", "b"]), "text", "\ud800", 7, float("nan")]
)
def test_a_gguf_header_whose_notes_are_of_another_type(tmp_path: Path, key: str, value: Array | str | float) -> None:
    """These files do not describe the model: it is planned, or refused in one line where a file is no text."""
    tree = parsed(make_tiny_gguf(tmp_path / "whole.gguf", file_type=7).read_bytes())
    (held,) = (one for one in tree.keys if one.name == key)
    held.value, held.kind = value, {Array: 9, str: 8, int: 4, float: 6}[type(value)]
    (tmp_path / "x.gguf").write_bytes(written(tree))
    code = ends("plan", str(tmp_path / "x.gguf"), "--include", "q_proj", "--local")
    assert code == (2 if value == "\ud800" else 0)


def test_a_gguf_header_that_makes_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the file that the library rejects, and the reason."""
    file = make_tiny_gguf(tmp_path / "whole.gguf")
    tree = parsed(file.read_bytes())
    assert written(tree) == file.read_bytes()
    (key,) = (key for key in tree.keys if key.name == "llama.feed_forward_length")
    key.kind, key.value = 8, "wide"
    file.write_bytes(written(tree))
    assert ends("plan", str(file), "--local") == 2
    printed = capsys.readouterr().err
    assert "intermediate_size" in printed
    assert "wide" in printed


@pytest.mark.parametrize("key", ["embedding_length", "feed_forward_length", "vocab_size"])
def test_a_gguf_header_of_a_larger_model_is_refused_before_that_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """A file of a hundred kilobytes, and a header of gigabytes."""
    file = make_tiny_gguf(tmp_path / "x.gguf")
    tree = parsed(file.read_bytes())
    (held,) = (one for one in tree.keys if one.name == f"llama.{key}")
    held.value = 1 << 20
    file.write_bytes(written(tree))
    for argv in (["convert", str(file), str(tmp_path / "out")], ["plan", str(file), "--local"]):
        assert ends(*argv) == 2
        assert "by the header" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [["fp8"], {}, 3, True])
@pytest.mark.parametrize(
    ("key", "place"),
    [("quant_method", ["quantization_config"]), ("quant_method", ["compression_config"]), ("model_type", []),
     ("model_type", ["text_config"]),
     ("quant_method", ["text_config", "quantization_config"])],
)  # fmt: skip
def test_a_name_in_a_config_that_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str, place: list[str], value: object
) -> None:
    file = folder / "model" / "config.json"
    changed = json.loads(file.read_bytes())
    inner = changed
    for step in place:
        inner = inner.setdefault(step, {})
    inner[key] = value
    with replaced(file, json.dumps(changed).encode()):
        assert ends("plan", str(folder / "model"), "--include", "q_proj", "--local") == 2
    assert f"config.json: {key}" in capsys.readouterr().err
