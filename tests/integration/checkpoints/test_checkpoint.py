"""Reading checkpoints from headers: equal to the library on good files, one clear line on bad ones."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.tensor_io import read_tensor
from pipeline.checkpoints.weight_files import INDEX
from pipeline.errors import CheckpointError, SwscError
from pipeline.planning.plan import make_plan
from pipeline.settings.matrix import MatrixSettings
from tests.support.tiny import make_tiny_model


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def a_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[1]


def edit_index(directory: Path, **changes: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= changes
    (directory / INDEX).write_text(json.dumps(index))


def test_tensors_by_byte_range_equal_those_of_the_library(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model))
    files = sorted(tiny_model.glob("*.safetensors"))
    assert len(files) > 3
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert checkpoint.tensors.keys() == theirs.keys()
    for name, info in checkpoint.tensors.items():
        assert torch.equal(read_tensor(checkpoint.store, info), theirs[name])


def test_every_dtype_of_a_weight_is_read(tmp_path: Path) -> None:
    values = torch.randn(4, 3)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
    tensors = {str(dtype): values.to(dtype) for dtype in dtypes} | {"empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    for name, tensor in tensors.items():
        ours = read_tensor(checkpoint.store, checkpoint.tensors[name])
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours.float(), tensor.float())


def test_fingerprint_changes_with_the_headers_and_the_config(broken: Path) -> None:
    before = open_checkpoint(str(broken)).fingerprint
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    assert open_checkpoint(str(broken)).fingerprint != before


def test_the_fingerprint_changes_with_every_tensor(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    whole = open_checkpoint(str(model))
    before = whole.fingerprint
    for info in whole.tensors.values():
        data = bytearray((model / info.file).read_bytes())
        own = slice(info.start, info.start + info.nbytes)
        data[own] = bytes(255 - value for value in data[own])
        (model / info.file).write_bytes(data)
        assert open_checkpoint(str(model)).fingerprint != before, info.name
        shutil.copy(tiny_model / info.file, model)
    assert open_checkpoint(str(model)).fingerprint == before


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-00004.safetensors", "config.json"])
def test_a_link_out_of_the_directory_is_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """What it leads to would be read, or copied into the output, as if it were the model's."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*elsewhere, outside the directory"):
        open_checkpoint(str(model))


def test_links_within_and_those_of_a_cache_of_the_hub_are_followed(tiny_model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "revision", tmp_path / "blobs"
    shutil.copytree(tiny_model, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "linked").symlink_to(snapshot)
    assert open_checkpoint(str(tmp_path / "linked")).fingerprint == open_checkpoint(str(tiny_model)).fingerprint


def test_a_tensor_with_the_name_of_a_part_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    save_file({"model.layers.0.self_attn.q_proj.labels": torch.zeros(3)}, model / "extra.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.q_proj.labels"] = "extra.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"q_proj\.labels .*q_proj\.weight"):
        make_plan(open_checkpoint(str(model)), MatrixSettings(bits=3))
    make_plan(open_checkpoint(str(model)), MatrixSettings(bits=3, exclude=r"layers\.0\."))


class TestDamage:
    """Each damage is refused by one line that names the file and the remedy."""

    def refused(self, directory: Path, *expected: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(directory))
        assert all(part in str(caught.value) for part in expected), str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "nowhere", "no such directory")

    def test_missing_shard(self, broken: Path) -> None:
        shard = a_shard(broken)
        shard.unlink()
        self.refused(broken, shard.name, "missing", "download")

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_truncated_shard(self, broken: Path, keep: int) -> None:
        shard = a_shard(broken)
        shard.write_bytes(shard.read_bytes()[:keep])
        self.refused(broken, shard.name, "truncated", "download")

    def test_shard_with_bytes_too_many(self, broken: Path) -> None:
        shard = a_shard(broken)
        shard.write_bytes(shard.read_bytes() + b"x")
        self.refused(broken, shard.name, "truncated or corrupt")

    def test_corrupt_header(self, broken: Path) -> None:
        shard = a_shard(broken)
        data = bytearray(shard.read_bytes())
        data[8] = ord("[")
        shard.write_bytes(data)
        self.refused(broken, shard.name, "corrupt header")

    def test_header_of_2_to_the_60_bytes_allocates_nothing(self, broken: Path) -> None:
        shard = a_shard(broken)
        shard.write_bytes(struct.pack("<Q", 2**60) + shard.read_bytes()[8:])
        self.refused(broken, shard.name, "not a safetensors file")

    def test_index_naming_an_absent_file(self, broken: Path) -> None:
        edit_index(broken, **{"model.norm.weight": "absent.safetensors"})
        self.refused(broken, "absent.safetensors", "missing")

    @pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", ""])
    def test_index_naming_a_path_outside_the_directory(self, broken: Path, path: str) -> None:
        (broken.parent / "outside.safetensors").write_bytes(b"")
        edit_index(broken, **{"model.norm.weight": path})
        self.refused(broken, "outside the directory")

    def test_index_putting_a_tensor_into_the_wrong_shard(self, broken: Path) -> None:
        edit_index(broken, **{"no.such.tensor": a_shard(broken).name})
        self.refused(broken, "no.such.tensor", a_shard(broken).name)

    @pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
    def test_index_that_is_no_index(self, broken: Path, index: str) -> None:
        (broken / INDEX).write_text(index)
        self.refused(broken, INDEX, "not an index")

    def test_tensor_in_two_shards(self, broken: Path) -> None:
        save_file({"model.norm.weight": torch.ones(64)}, broken / "extra.safetensors")
        edit_index(broken, other="extra.safetensors")
        self.refused(broken, "model.norm.weight", "extra.safetensors", "keep one")

    def test_pickle_checkpoint_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text("{}")
        self.refused(tmp_path, "pickle", "save_pretrained")

    def test_several_files_without_an_index(self, broken: Path) -> None:
        (broken / INDEX).unlink()
        self.refused(broken, "safetensors files", INDEX)

    @pytest.mark.parametrize("config", [None, "{", "[]"])
    def test_config_that_is_missing_or_damaged(self, broken: Path, config: str | None) -> None:
        (broken / "config.json").unlink()
        if config is not None:
            (broken / "config.json").write_text(config)
        self.refused(broken, "config.json")

    def test_the_error_of_a_directory_of_gguf_files_shows_how_to_choose_one(self, tmp_path: Path) -> None:
        (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"give the name of one of them: \S+model-q4.gguf"):
            open_checkpoint(str(tmp_path))

    def test_addresses_of_unknown_schemes_are_refused(self) -> None:
        for location in ("ftp://host/model", "s3://"):
            with pytest.raises(SwscError, match="unsupported URL"):
                open_checkpoint(location)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": ENTRY, "b": ENTRY},
        {"a": {**ENTRY, "data_offsets": [4, 12]}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {**ENTRY, "shape": [2**62, 2**62]}},
        {"a": {**ENTRY, "dtype": 13}},
        {"a": {**ENTRY, "shape": [2.0]}},
        {"a": 5},
        {"a": {}},
        [],
    ],
)
def test_headers_whose_ranges_do_not_fit_are_refused(tmp_path: Path, entries: object) -> None:
    raw = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="corrupt"):
        open_checkpoint(str(tmp_path))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("mutated")
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    raw = bytearray((directory / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        checkpoint = open_checkpoint(str(directory))
    except CheckpointError:
        return
    for info in checkpoint.tensors.values():
        assert read_tensor(checkpoint.store, info).shape == info.shape


WIDTHS = {
    "F64": 64, "C64": 64, "U64": 64, "I64": 64, "U32": 32, "U16": 16, "BOOL": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def test_every_dtype_of_the_format_is_copied_by_its_width_to_the_byte(tmp_path: Path) -> None:
    """A tensor of 4×6 values of each, some of which torch has no dtype for."""
    model, own = make_tiny_model(tmp_path / "model", layers=1, shards=False), {}
    raw = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for number, (dtype, bits) in enumerate(WIDTHS.items()):
        own[dtype] = bytes([number + 1]) * (24 * bits // 8)
        header[f"extra.{dtype}"] = {
            "dtype": dtype,
            "shape": [4, 6],
            "data_offsets": [len(data), len(data) + len(own[dtype])],
        }
        data += own[dtype]
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    source = open_checkpoint(str(model))
    plan = make_plan(source, MatrixSettings(bits=4))
    copied = {decision.info.name for decision in plan.decisions if decision.action == "copied"}
    assert {f"extra.{dtype}" for dtype in WIDTHS} <= copied
    assert main(["compress", str(model), str(tmp_path / "out"), "--local", "--bits", "4"]) == 0
    written = open_checkpoint(str(tmp_path / "out"))
    for dtype, content in own.items():
        info = written.tensors[f"extra.{dtype}"]
        assert (info.dtype, info.shape) == (dtype, (4, 6))
        assert bytes(written.store.read(info.file, info.start, info.nbytes)) == content


def test_a_dtype_of_a_later_format_is_not_called_corrupt(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1, shards=False)
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw.replace(b'"dtype":"BF16"', b'"dtype":"BF17"', 1))
    with pytest.raises(CheckpointError, match="BF17") as found:
        open_checkpoint(str(model))
    assert "corrupt" not in str(found.value)
