"""Which files beside the weights are copied, and what every other one is left out for."""

import os
from pathlib import Path

import pytest

from pipeline.checkpoints.extra_files import ExtraFiles, find_extra_files
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store

WEIGHTS = ["model.safetensors"]
COPIED = (
    "LICENSE", "NOTICE.txt", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "code/deep/modeling.py",
    "code/modeling.py", "generation_config.json", "licenses/LICENSE-2.0", "modeling_own.py", "preprocessor_config.json",
    "tokenizer.model", "tokenizer/vocab.json", "tokenizer/qwen.tiktoken", "tokenizer/tokenizer.model.v3",
)  # fmt: skip
LEFT_OUT = (
    ".cache/", ".gitattributes", "adapter_config.json", "adapter_model.safetensors", "checkpoint-500/",
    "consolidated.safetensors", "flax_model.msgpack", "global_step12/", "model.onnx", "onnx/", "optimizer.pt",
    "original/",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "swsc_adapter/", "swsc_report.json", "tf_model.h5",
    "tokenizer/.DS_Store", "tokenizer/picture.png", "vision/", "x.json.1234.partial",
)  # fmt: skip


def fill(root: Path, names: tuple[str, ...]) -> Store:
    for name in names:
        file = root / (f"{name}config.json" if name.endswith("/") else name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return Store.at(str(root))


def left_out(extras: ExtraFiles) -> dict[str, str]:
    return {one.name: one.reason for one in extras.ignored}


def test_what_belongs_to_a_model_is_copied_and_all_else_is_named_with_a_reason(tmp_path: Path) -> None:
    fill(tmp_path, (*COPIED, *LEFT_OUT, "config.json", "model.safetensors", "model.safetensors.index.json"))
    store = fill(tmp_path, ("vision/model.safetensors",))
    extras = find_extra_files(store, WEIGHTS)
    assert extras.copied == tuple(sorted(COPIED))
    assert left_out(extras).keys() == set(LEFT_OUT)
    assert all(left_out(extras).values())


def test_folders_without_end_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(1200):
        (tmp_path / "many" / f"{number}.json").touch()
    store = fill(tmp_path, ("a/b/c/d/e/f/g/h/i/j/k.json", "a/k.json"))
    extras = find_extra_files(store, WEIGHTS)
    assert extras.copied == ("a/k.json",)
    assert left_out(extras).keys() == {"many/", "a/b/c/d/e/f/g/"}


def test_a_folder_that_is_linked_to_itself_is_looked_into_once(tmp_path: Path) -> None:
    store = fill(tmp_path, ("tokenizer/vocab.json",))
    for name in ("one", "two"):
        os.symlink(tmp_path / "tokenizer", tmp_path / "tokenizer" / name)
    assert find_extra_files(store, WEIGHTS).copied == ("tokenizer/vocab.json",)


def test_a_link_to_the_model_itself_is_not_looked_into(tmp_path: Path) -> None:
    store = fill(tmp_path, ("vocab.json", "tokenizer/vocab.json"))
    os.symlink(".", tmp_path / "latest")
    os.symlink("..", tmp_path / "tokenizer" / "up")
    assert find_extra_files(store, WEIGHTS) == ExtraFiles(("tokenizer/vocab.json", "vocab.json"), ())


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer/inner", "tokenizer/vocab.json"])
def test_a_link_out_of_the_directory_is_refused_wherever_it_is(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    fill(outside, ("secret.json",))
    link = tmp_path / "model" / name
    link.parent.mkdir(parents=True)
    os.symlink(outside / "secret.json" if name.endswith("json") else outside, link)
    with pytest.raises(CheckpointError, match="outside the directory"):
        find_extra_files(Store.at(str(tmp_path / "model")), WEIGHTS)
