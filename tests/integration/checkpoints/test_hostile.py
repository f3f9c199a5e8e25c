"""Checkpoints that somebody made to do harm: a clear error each, no crash, no hang, little memory.

pytest tests/integration/checkpoints/test_hostile.py --hypothesis-profile thorough       10,000 of each
"""

import contextlib
import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.weight_files import INDEX, SINGLE
from pipeline.errors import CheckpointError, SwscError
from pipeline.models.stored_model import open_model
from pipeline.planning.plan import make_plan
from pipeline.settings.matrix import MatrixSettings
from tests.support.tiny import make_tiny_model

MOST_BYTES = 100_000_000  # that opening one may allocate
MOST_SECONDS = 2.0  # of a core, that opening one may take: a clock on the wall would time the machine
SHARD = "model-00001-of-00001.safetensors"
PATIENT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ODD = st.one_of(
    st.sampled_from([-1, 0, 1, 7, 2**31, 2**60, 2**63, 2**200, 1.5, float("inf"), None, True, "", "../..", "\0",
    "/etc/passwd"]),
    st.text(max_size=8), st.lists(st.integers(-2, 2**62), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("whole") / "model", layers=1, shards=False)


@pytest.fixture(scope="module")
def compressed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The intact model, compressed, beside a copy of it."""
    folder = tmp_path_factory.mktemp("compressed")
    shutil.copytree(whole, folder / "model")
    assert main(["compress", str(folder / "model"), str(folder / "out"), "--local"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def place(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("hostile") / "model"))


def opened(place: Path) -> bool:
    """Whether the directory opens. Otherwise the error is one of this project; an opened tensor is within its file."""
    message = ""
    tracemalloc.start()
    started = time.process_time()
    try:
        checkpoint = open_checkpoint(str(place))
        for info in checkpoint.tensors.values():
            assert 0 < info.start <= info.start + info.nbytes <= (place / info.file).stat().st_size
            assert (place / info.file).resolve().parent == place
        make_plan(checkpoint, MatrixSettings())
    except SwscError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES
    assert time.process_time() - started < MOST_SECONDS
    assert not message or str(place) in message, "what is wrong is named"
    return not message


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@PATIENT
@given(data=st.data())
def test_bytes_of_a_file_that_were_changed(whole: Path, place: Path, data: st.DataObject) -> None:
    content = bytearray((whole / SINGLE).read_bytes()[:8000])
    (place / SINGLE).write_bytes((whole / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["set", "insert", "cut", "drop"]))
        if kind == "set" and at < len(content):
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        elif kind == "cut":
            del content[at:]
        else:
            del content[at : at + data.draw(st.integers(1, 20))]
    (place / SINGLE).write_bytes(bytes(content))
    assert not opened(place), "the file is shorter than its header states"


@PATIENT
@given(data=st.data())
def test_headers_with_odd_values(whole: Path, place: Path, data: st.DataObject) -> None:
    header, body = split((whole / SINGLE).read_bytes())
    names = sorted(header)
    for _ in range(data.draw(st.integers(1, 3))):
        name, odd = data.draw(st.sampled_from(names)), data.draw(ODD)
        where = data.draw(st.sampled_from(["entry", "dtype", "shape", "data_offsets", "inside", "name", "gone"]))
        entry = header.get(name)
        if where == "entry":
            header[name] = odd
        elif where == "name":
            header[str(odd)] = entry
        elif where == "gone":
            header.pop(name, None)
        elif where == "inside" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            entry["shape"][:1] = [odd]
        elif isinstance(entry, dict):
            entry[where] = odd
    (place / SINGLE).write_bytes(file_of(json.dumps(header).encode(), body))
    opened(place)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a":{},"a":{}}',
        b"\xff\xfe{}",
        b'{"__metadata__": []}',
        b'{"w":{"dtype":"F32","shape":[' + b",".join([b"1"] * 100_000) + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[0,1152921504606846976],"data_offsets":[0,0]}}',
    ],
)
def test_headers_that_are_made_to_hurt(place: Path, header: bytes) -> None:
    (place / SINGLE).write_bytes(file_of(header, bytes(4)))
    assert not opened(place)


@pytest.mark.parametrize("length", [0, 1, 2**24, 2**32, 2**60, 2**64 - 1])
def test_lengths_of_headers_that_cannot_be(place: Path, length: int) -> None:
    (place / SINGLE).write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    assert not opened(place)


def test_a_sparse_file_whose_header_length_is_the_file_size(place: Path) -> None:
    with open(place / SINGLE, "wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    assert not opened(place)


def sharded(whole: Path, folder: Path) -> Path:
    """A copy whose file is a shard: an index beside `model.safetensors` is never read."""
    shutil.copytree(whole, folder)
    (folder / SINGLE).rename(folder / SHARD)
    names = [name for name in split((folder / SHARD).read_bytes())[0] if name != "__metadata__"]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))
    return folder


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize("nested", ["[" * 200_000, '{"a":' * 200_000])
def test_json_files_that_are_nested_without_end(whole: Path, tmp_path: Path, name: str, nested: str) -> None:
    folder = sharded(whole, tmp_path / "model")
    (folder / name).write_text(nested)
    assert not opened(folder)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_files_of_holes(whole: Path, tmp_path: Path, name: str) -> None:
    folder = sharded(whole, tmp_path / "model")
    with open(folder / name, "ab") as file:
        file.truncate(2**41)
    assert not opened(folder)


@PATIENT
@given(data=st.data())
def test_indexes_with_odd_values(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    place = sharded(whole, tmp_path_factory.mktemp("odd") / "model")
    weight_map: Any = json.loads((place / INDEX).read_text())["weight_map"]
    assert opened(place)
    for _ in range(data.draw(st.integers(1, 3))):
        weight_map[data.draw(st.sampled_from([*weight_map, "new"]))] = data.draw(ODD)
    whole_index = {"weight_map": data.draw(st.one_of(st.just(weight_map), ODD)), "metadata": data.draw(ODD)}
    (place / INDEX).write_text(json.dumps(data.draw(st.one_of(st.just(whole_index), ODD))))
    assert not opened(place) or all(file == SHARD for file in weight_map.values())


@PATIENT
@given(data=st.data())
def test_configs_with_odd_values(whole: Path, place: Path, data: st.DataObject) -> None:
    (place / SINGLE).write_bytes((whole / SINGLE).read_bytes())
    config = json.loads((whole / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from([*config, "quantization_config", "text_config", "n_layer"]))
        config[key] = data.draw(ODD)
    (place / "config.json").write_text(json.dumps(data.draw(st.one_of(st.just(config), ODD))))
    try:
        opened(place)
    finally:
        shutil.copy(whole / "config.json", place)


@PATIENT
@given(data=st.data())
def test_compressed_models_with_odd_values(compressed: Path, data: st.DataObject) -> None:
    """Of their tensors: what is read then is refused, or read without harm."""
    config = json.loads((compressed / "config.json").read_text())
    whole, entries = json.dumps(config), config["quantization_config"]["tensors"]
    for _ in range(data.draw(st.integers(1, 3))):
        entry = entries[data.draw(st.sampled_from([*entries]))]
        if isinstance(entry, dict) and entry:
            key = data.draw(st.sampled_from([*entry, "new"]))
            entry[key] = data.draw(ODD)
            if data.draw(st.booleans()):
                entry.pop(key)
    config["quantization_config"]["tensors"] = data.draw(st.one_of(st.just(entries), st.just(entries), ODD))
    (compressed / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        with contextlib.suppress(SwscError):
            model = open_model(str(compressed))
            for name in model.names:
                with contextlib.suppress(ValueError, RuntimeError):  # parts that do not fit their description
                    model.read(name)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
        (compressed / "config.json").write_text(whole)


def test_an_entry_that_does_not_fit_its_matrix_is_refused_by_name(compressed: Path, tmp_path: Path) -> None:
    output = shutil.copytree(compressed, tmp_path / "out")
    config = json.loads((output / "config.json").read_text())
    name, entry = next(iter(config["quantization_config"]["tensors"].items()))
    entry["codebooks"] = 7
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{name}: .* codebooks 7 do not divide its \d+ rows"):
        open_model(str(output))


@pytest.mark.parametrize("content", ["[" * 200_000, '{"files": {"config.json": {"size": "x", "sha256": "y"}}}', "{}"])
def test_manifests_with_odd_values(
    compressed: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(compressed, tmp_path / "out")
    (output / "swsc_manifest.json").write_text(content)
    assert main(["verify", str(output), "--local"]) == 1
    assert "swsc_manifest.json is damaged" in capsys.readouterr().err
    assert main(["compress", str(compressed.parent / "model"), str(output), "--local"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_secret_in_an_address_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "s3://AKIAKEY:secret/with@bucket/model"]) == 2
    assert main(["plan", "s3://AKIAKEY:secret@bucket/model"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "secret" not in error
    assert "AKIAKEY" not in error


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside.safetensors"])
def test_an_index_that_leads_out_of_the_directory(whole: Path, tmp_path: Path, target: str) -> None:
    folder = sharded(whole, tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": target}}))
    with pytest.raises(SwscError, match=r"outside the directory|is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "((w|w)*)*!"])
def test_a_pattern_of_a_tokenizer_that_never_ends_is_one_line(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], pattern: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("a" * 60 + "w" * 60 + ".")
    started = time.process_time()
    assert main(["evaluate", str(folder), "--text", str(tmp_path / "text.txt"), "--seqlen", "8", "--local"]) == 2
    assert time.process_time() - started < 5
    assert "error: " in capfd.readouterr().err
