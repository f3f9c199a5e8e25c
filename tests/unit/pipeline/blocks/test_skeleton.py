"""A model of which only the requested parameters take memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.blocks import reader as reader_module
from pipeline.blocks.skeleton import Skeleton
from pipeline.errors import CheckpointError, StoreError
from pipeline.models.loading import ModelKey, load_model
from pipeline.models.stored_model import open_model
from swsc_core.storage.alignment import is_aligned
from tests.support.tiny import make_tiny_model, moved

LAYER = "model.layers.1."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def skeleton_of(model: Path, dtype: str = "float32") -> Skeleton:
    return Skeleton(open_model(str(model)), ModelKey(str(model), dtype, 1), "cpu")


def loaded(skeleton: Skeleton) -> set[str]:
    """Names of the parameters that take memory."""
    return {name for name, tensor in skeleton.model.named_parameters(remove_duplicate=False) if not tensor.is_meta}


def names_of(skeleton: Skeleton, prefix: str) -> list[str]:
    return [name for name, _ in skeleton.model.named_parameters() if name.startswith(prefix)]


@pytest.fixture
def skeleton(tiny_model: Path) -> Skeleton:
    return skeleton_of(tiny_model)


def test_only_requested_parameters_are_loaded(skeleton: Skeleton) -> None:
    assert loaded(skeleton) == set()
    names = names_of(skeleton, LAYER)
    skeleton.load(names)
    assert loaded(skeleton) == set(names)


def test_released_parameters_are_on_the_meta_device_and_can_be_loaded_again(skeleton: Skeleton) -> None:
    names = names_of(skeleton, LAYER)
    skeleton.load(names)
    before = {name: skeleton.model.get_parameter(name).clone() for name in names}
    skeleton.release(names[1:])
    assert loaded(skeleton) == {names[0]}
    skeleton.load(names)
    assert all(torch.equal(skeleton.model.get_parameter(name), before[name]) for name in names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_the_whole_model(tiny_model: Path, dtype: str) -> None:
    skeleton, key = skeleton_of(tiny_model, dtype), ModelKey(str(tiny_model), dtype, 1)
    whole = load_model(open_model(str(tiny_model)), key, "cpu")
    skeleton.load(whole.state_dict())
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        own = skeleton.model.get_parameter_or_buffer(name)
        assert own.dtype == tensor.dtype, name
        assert torch.equal(own, tensor), name
        assert not own.requires_grad


def test_what_is_loaded_is_not_read_again(skeleton: Skeleton) -> None:
    names = names_of(skeleton, LAYER)
    skeleton.load(names)
    nbytes = skeleton.bytes_read
    assert nbytes == skeleton.nbytes(names) > 0
    skeleton.load(names)
    assert skeleton.bytes_read == nbytes


def test_parameters_are_aligned_to_64_bytes_wherever_their_file_has_them(tiny_model: Path, tmp_path: Path) -> None:
    skeleton = skeleton_of(moved(tiny_model, tmp_path / "moved", 8))
    skeleton.load(skeleton.model.state_dict())
    assert all(is_aligned(tensor) for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers()))


@pytest.mark.parametrize("requested", [EMBEDDING, HEAD])
def test_tied_parameters_are_loaded_shared_and_released_together(skeleton: Skeleton, requested: str) -> None:
    skeleton.load([requested])
    assert loaded(skeleton) == {EMBEDDING, HEAD}
    assert skeleton.model.get_parameter(EMBEDDING) is skeleton.model.get_parameter(HEAD)
    skeleton.release([requested])
    assert loaded(skeleton) == set()


def test_parameters_that_the_class_ties_but_the_files_do_not_stay_separate(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", shards=False)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, model / "model.safetensors", {"format": "pt"})
    skeleton = skeleton_of(model)
    skeleton.load([EMBEDDING, HEAD])
    embedding, head = (skeleton.model.get_parameter(name) for name in (EMBEDDING, HEAD))
    assert torch.equal(embedding, tensors[EMBEDDING].float())
    assert torch.equal(head, (tensors[EMBEDDING] + 1).float())


def test_a_parameter_that_the_files_lack_is_named(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", shards=False)
    tensors = load_file(model / "model.safetensors")
    lacking = f"{LAYER}mlp.up_proj.weight"
    del tensors[lacking]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the files lack model\.layers\.1\.mlp\.up_proj\.weight"):
        skeleton_of(model).load([lacking])


def test_a_load_that_fails_leaves_nothing_behind(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of(skeleton, LAYER)
    real: Any = reader_module.read_tensor

    def read(store: Any, info: Any, digests: Any = None) -> Any:
        if "up_proj" in info.name:
            raise StoreError(f"{info.name}: no answer")
        return real(store, info, digests)

    with monkeypatch.context() as patch:
        patch.setattr(reader_module, "read_tensor", read)
        with pytest.raises(StoreError, match="no answer"):
            skeleton.load(names)
    assert loaded(skeleton) == set()
    skeleton.load(names)
    assert loaded(skeleton) == set(names)


def test_parameters_loaded_during_inference_serve_a_backward_pass(skeleton: Skeleton) -> None:
    name = f"{LAYER}mlp.up_proj.weight"
    with torch.inference_mode():
        skeleton.load([name])
    weight = skeleton.model.get_parameter(name)
    inputs = torch.ones(2, weight.shape[1], requires_grad=True)
    torch.nn.functional.linear(inputs, weight).sum().backward()
    assert inputs.grad is not None
