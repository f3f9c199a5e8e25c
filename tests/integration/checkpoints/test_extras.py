"""Files in subfolders of a model are in every output, its manifest, its copies in an object store and on the Hub."""

import builtins
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jobs.cli import main
from tests.support.tiny import make_tiny_model

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
QK = ["--projectors", "q,k", "--clusters", "8", "--rank", "2", "--local"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with two chat templates, code in a folder, and an ONNX export beside it."""
    path = make_tiny_model(tmp_path_factory.mktemp("extras") / "model", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(path)
    for name in ("code/inner/modeling.py", "onnx/model.onnx", "optimizer.pt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("pass\n")
    return path


@pytest.fixture(scope="module")
def output(model: Path) -> Path:
    out = model.parent / "out"
    assert main(["compress", str(model), str(out), *QK]) == 0
    return out


def manifest_of(output: Path) -> dict[str, object]:
    return dict(json.loads((output / "swsc_manifest.json").read_text())["files"])


def test_templates_and_code_of_folders_are_in_the_output_and_in_its_manifest(model: Path, output: Path) -> None:
    assert AutoTokenizer.from_pretrained(output).chat_template == TEMPLATES
    nested = {"additional_chat_templates/tool_use.jinja", "code/inner/modeling.py"}
    assert nested <= manifest_of(output).keys()
    assert all((output / name).read_bytes() == (model / name).read_bytes() for name in nested)
    assert main(["verify", str(output), "--local"]) == 0


def test_what_is_left_out_is_named_with_its_reason(model: Path, output: Path, tmp_path: Path) -> None:
    assert main(["plan", str(model), "--json", str(tmp_path / "plan.json"), *QK]) == 0
    for file in (tmp_path / "plan.json", output / "swsc_report.json"):
        found = json.loads(file.read_text())["left_out"]
        assert found.keys() == {"onnx/", "optimizer.pt"}
        assert all(found.values())
    assert not (output / "onnx").exists()


def test_restoring_carries_them_on(output: Path, tmp_path: Path) -> None:
    assert main(["restore", str(output), str(tmp_path / "dense"), "--local"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").chat_template == TEMPLATES


def test_a_changed_file_of_a_folder_is_damage(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    (copy / "additional_chat_templates/tool_use.jinja").write_text("{{ tolos }}")
    assert main(["verify", str(copy), "--local"]) == 1
    assert "additional_chat_templates/tool_use.jinja: content differs" in capsys.readouterr().err


def test_folders_of_an_output_go_when_it_is_replaced(model: Path, output: Path, tmp_path: Path) -> None:
    copy, plain = Path(shutil.copytree(output, tmp_path / "copy")), Path(shutil.copytree(model, tmp_path / "plain"))
    (copy / "code" / "mine.txt").write_text("of the user")
    for folder in ("additional_chat_templates", "code"):
        shutil.rmtree(plain / folder)
    assert main(["compress", str(plain), str(copy), *QK, "--overwrite"]) == 0
    assert not (copy / "additional_chat_templates").exists()
    assert [str(file.relative_to(copy)) for file in (copy / "code").rglob("*")] == ["code/mine.txt"]
    assert main(["verify", str(copy), "--local"]) == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "code/inner/modeling.py", "model.safetensors.index.json"])
def test_a_dangling_link_is_an_error_before_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """As in a cache of the Hub whose blobs were removed: the file was missing in the output, without a word."""
    copy = Path(shutil.copytree(model, tmp_path / "models--org--m" / "snapshots" / "abc"))
    (copy / name).unlink()
    (copy / name).symlink_to(tmp_path / "models--org--m" / "blobs" / "0123")
    assert main(["compress", str(copy), str(tmp_path / "out"), *QK]) == 2
    assert f"{name} is a broken link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unreadable_file_is_an_error_before_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, name = builtins.open, f"{model}/code/inner/modeling.py"

    def opened(path: Any, *how: Any, **more: Any) -> Any:
        if str(path) == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(path, *how, **more)

    monkeypatch.setattr(builtins, "open", opened)
    assert main(["compress", str(model), str(tmp_path / "out"), *QK]) == 2
    assert f"{name}: permission denied" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_volume_is_no_part_of_a_model_nor_of_an_output(model: Path, tmp_path: Path) -> None:
    for folder in ("volume", "out"):
        (tmp_path / folder / "lost+found").mkdir(parents=True)
    (tmp_path / "volume" / "lost+found").chmod(0)  # its owner's alone, root's on a real one
    shutil.copytree(model, tmp_path / "volume", dirs_exist_ok=True)
    assert main(["compress", str(tmp_path / "volume"), str(tmp_path / "out"), *QK]) == 0
    assert main(["compress", str(tmp_path / "volume"), str(tmp_path / "out"), *QK]) == 0


def test_an_adapter_that_restore_left_beside_a_dense_model_is_named(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", str(output), str(tmp_path / "dense"), "--adapter", "--local"]) == 0
    capsys.readouterr()
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *QK]) == 0
    assert "left out: swsc_adapter/" in capsys.readouterr().err


def test_layers_that_sentence_transformers_puts_after_a_model_are_copied_with_it(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    folders = {
        "1_Pooling": {"pooling_mode_mean_tokens": True},
        "2_Dense": {"in_features": 64},
        "3_Other": {"model_type": "bert"},
    }
    (copy / "modules.json").write_text(json.dumps([{"path": ""}, *({"path": folder} for folder in folders)]))
    for folder, config in {**folders, "4_Unnamed": {}}.items():
        (copy / folder).mkdir()
        (copy / folder / "config.json").write_text(json.dumps(config))
        (copy / folder / "model.safetensors").write_bytes(b"of a layer")
    (copy / "2_Dense" / "pytorch_model.bin").write_bytes(b"never opened")
    assert main(["compress", str(copy), str(tmp_path / "out"), *QK]) == 0
    own = {"1_Pooling/config.json", "1_Pooling/model.safetensors", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert {name for name in manifest_of(tmp_path / "out") if name[0].isdigit()} == own
    assert main(["verify", str(tmp_path / "out"), "--local"]) == 0
    left = json.loads((tmp_path / "out" / "swsc_report.json").read_text())["left_out"]
    assert {"2_Dense/pytorch_model.bin", "3_Other/", "4_Unnamed/"} <= left.keys()
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
    assert own <= manifest_of(tmp_path / "dense").keys()


@pytest.mark.parametrize("damaged", ["{", "[1]", '{"path": 3}', "null", '[{"path": "../model"}]'])
def test_a_list_of_layers_that_is_none_is_copied_as_any_file(model: Path, tmp_path: Path, damaged: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "modules.json").write_text(damaged)
    assert main(["compress", str(copy), str(tmp_path / "out"), *QK]) == 0
    assert "modules.json" in manifest_of(tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "code/inner/modeling.py", "model-00001-of-00002.safetensors"])
def test_what_a_clone_without_git_lfs_holds_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 17082734\n"
    file = sorted(copy.glob("*.safetensors"))[0] if name.endswith(".safetensors") else copy / name
    file.write_text(pointer)
    assert main(["compress", str(copy), str(tmp_path / "out"), *QK]) == 2
    assert "git lfs pull" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_given_as_a_model_is_called_one(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model / "config.json")]) == 2
    assert "config.json: a file; give the directory" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["compress", "restore"])
def test_a_file_that_has_changed_in_the_source_is_reported_and_copied_with_overwrite(
    model: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Regression: with --overwrite, too, the output counted as complete, and the old tokenizer stayed."""
    source = Path(shutil.copytree(model if verb == "compress" else output, tmp_path / "source"))
    (source / "swsc_manifest.json").unlink(missing_ok=True)
    command = [verb, str(source), str(tmp_path / "out"), *(QK if verb == "compress" else ["--local"])]
    assert main(command) == 0
    (source / "tokenizer_config.json").write_text("{}")
    (source / "added.txt").write_text("since then")
    capsys.readouterr()
    assert main(command) == 0
    assert "added.txt of " in capsys.readouterr().err
    assert not (tmp_path / "out" / "added.txt").exists()
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "added.txt").exists()
    capsys.readouterr()
    assert main(command) == 0
    assert "note:" not in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out"), "--local"]) == 0
