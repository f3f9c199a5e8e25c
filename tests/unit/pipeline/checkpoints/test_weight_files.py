"""The files of a model's weights are those that transformers reads."""

import json
from pathlib import Path

import pytest

from pipeline.checkpoints.weight_files import INDEX, SINGLE, tensor_files, weight_files
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store

SHARDS = tensor_files(2)


def directory(path: Path, *names: str) -> tuple[Store, list[str]]:
    for name in names:
        (path / name).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    return Store.at(str(path)), sorted(names)


def test_a_single_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    weights = weight_files(*directory(tmp_path, SINGLE, INDEX, *SHARDS, "adapter_model.safetensors"))
    assert (weights.files, weights.weight_map) == ([SINGLE], {})
    assert {file.name for file in weights.ignored} == {INDEX, *SHARDS, "adapter_model.safetensors"}
    assert all(file.reason for file in weights.ignored)


def test_an_index_names_the_shards(tmp_path: Path) -> None:
    weights = weight_files(*directory(tmp_path, INDEX, *SHARDS, "model.fp16.safetensors"))
    assert (weights.files, weights.weight_map) == (SHARDS, {"a": SHARDS[0], "b": SHARDS[1]})
    assert [file.name for file in weights.ignored] == ["model.fp16.safetensors"]


def test_a_config_may_name_the_file(tmp_path: Path) -> None:
    assert weight_files(*directory(tmp_path, SINGLE, "x.safetensors"), "x.safetensors").files == ["x.safetensors"]
    for name in ("absent.safetensors", "x.bin", 3):
        with pytest.raises(CheckpointError, match="transformers_weights"):
            weight_files(Store.at(str(tmp_path)), ["x.bin", SINGLE], name)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["adapter_config.json"], "adapter"), (["model.fp16.safetensors"], "variant"), (["a.safetensors"], "rename"),
        (["a.safetensors", "b.safetensors"], INDEX), (["pytorch_model.bin"], "pickle"), (["m.gguf"], "m.gguf"),
        ([], "no "),
    ],
)  # fmt: skip
def test_the_reason_for_no_weights(tmp_path: Path, names: list[str], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        weight_files(*directory(tmp_path, *names))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=SHARDS[1]):
        weight_files(*directory(tmp_path, INDEX, SHARDS[0]))
