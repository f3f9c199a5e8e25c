"""Which files are the model: `from_pretrained`'s choice, for every stage alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import swsc_core.hf  # noqa: F401
from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.weight_files import INDEX, SINGLE
from pipeline.errors import CheckpointError
from pipeline.models.loading import ModelKey, load_model
from pipeline.models.stored_model import open_model
from tests.support.tiny import make_tiny_model

_KEY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """In one file, untied."""
    return make_tiny_model(tmp_path / "model", layers=1, shards=False, tied=False)


def other_weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in load_file(model / SINGLE).items()}


def require_agreement(model: Path) -> None:
    """What is compressed, what is measured and what transformers loads are the same weights."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    measured = load_model(open_model(str(model)), ModelKey(str(model), "float32", 1), "cpu").state_dict()
    stored = open_model(str(model))
    assert theirs.keys() == measured.keys() == set(stored.names)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, measured[name])
        assert torch.equal(tensor, stored.read(name).float())


def test_one_file_goes_before_an_index(model: Path) -> None:
    save_file(other_weights(model), model / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(model / SINGLE), "model-00001-of-00001.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": names}))
    require_agreement(model)
    left = {name for name, _ in open_checkpoint(str(model)).ignored_weights}
    assert left == {INDEX, "model-00001-of-00001.safetensors"}


def test_an_index_of_absent_shards_beside_one_file_is_passed_over(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {_KEY: "absent.safetensors"}}))
    require_agreement(model)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "a.safetensors"]
)
def test_other_files_are_not_the_model(model: Path, name: str) -> None:
    save_file(other_weights(model), model / name)
    require_agreement(model)
    assert [one.name for one in open_checkpoint(str(model)).ignored_weights] == [name]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "weights.safetensors"])
def test_a_file_that_transformers_would_not_read_is_refused(model: Path, name: str) -> None:
    (model / SINGLE).rename(model / name)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(str(model))


def test_the_file_that_the_config_names_goes_before_all(model: Path) -> None:
    save_file(other_weights(model), model / "chosen.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "chosen.safetensors"}))
    require_agreement(model)
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "../chosen.safetensors"}))
    with pytest.raises(CheckpointError, match="transformers_weights"):
        open_checkpoint(str(model))


def test_an_adapter_beside_is_named_and_neither_measured_nor_copied(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = load_model(open_model(str(model)), ModelKey(str(model), "float32", 1), "cpu").state_dict()
    how = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(plain, how).save_pretrained(model)
    found = load_model(open_model(str(model)), ModelKey(str(model), "float32", 1), "cpu").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    output = tmp_path / "output"
    assert main(["compress", str(model), str(output), "--clusters", "4", "--rank", "2", "--local"]) == 0
    assert "adapter_config.json" in capsys.readouterr().err
    assert not list(output.glob("adapter*"))
    AutoModelForCausalLM.from_pretrained(output)


def test_an_adapter_without_a_model_is_refused_as_such(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = model.parent / "alone"
    alone.mkdir()
    shutil.copy(model / SINGLE, alone / "adapter_model.safetensors")
    (alone / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert main(["plan", str(alone)]) == 2
    assert "org/base" in capsys.readouterr().err


def test_an_output_does_not_name_the_file_that_its_source_was_read_from(model: Path, tmp_path: Path) -> None:
    """It did, and nothing opened it, although compress and verify had found no fault."""
    (model / SINGLE).rename(model / "chosen.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "chosen.safetensors"}))
    assert main(["compress", str(model), str(tmp_path / "out"), "--bits", "4", "--local"]) == 0
    assert main(["restore", str(tmp_path / "out"), str(tmp_path / "dense"), "--local"]) == 0
    for name in ("out", "dense"):
        assert _KEY in open_model(str(tmp_path / name)).names
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
