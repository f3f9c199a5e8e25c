"""Headers of a checkpoint are compared with the entries of config.json, and every difference names the tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from swsc_core import RtnSpec, encode
from swsc_core.hf.checkpoint_checks import CheckpointHeaders

ENCODED = encode(torch.randn(8, 16), [RtnSpec(4, "channel")])
ENTRIES = {"a.weight": ENCODED.entry}
STORED = {f"a.{part}": tensor for part, tensor in ENCODED.tensors.items()}


def checkpoint(directory: Path, tensors: dict[str, Tensor]) -> CheckpointHeaders:
    file = directory / "model.safetensors"
    save_file(tensors, file)
    return CheckpointHeaders.read("DIR", [str(file)])


def test_headers_hold_dtypes_and_shapes(tmp_path: Path) -> None:
    headers = checkpoint(tmp_path, {"norm": torch.ones(3, dtype=torch.bfloat16)})
    assert headers.tensors == {"norm": ("BF16", (3,))}


def test_complete_parts_are_accepted(tmp_path: Path) -> None:
    checkpoint(tmp_path, STORED).require_entries(ENTRIES)


@pytest.mark.parametrize("part", STORED)
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    others = {name: tensor for name, tensor in STORED.items() if name != part}
    with pytest.raises(ValueError, match=rf"DIR: {part} "):
        checkpoint(tmp_path, others).require_entries(ENTRIES)


def test_a_part_of_another_shape_or_kind_is_named(tmp_path: Path) -> None:
    for wrong in (torch.zeros(5, dtype=torch.uint8), STORED["a.weight"].float()):
        with pytest.raises(ValueError, match=r"DIR: a\.weight "):
            checkpoint(tmp_path, STORED | {"a.weight": wrong}).require_entries(ENTRIES)


def test_packed_values_without_an_entry_are_named(tmp_path: Path) -> None:
    stray = {"b.labels": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"b\.labels has no entry"):
        checkpoint(tmp_path, STORED | stray).require_entries(ENTRIES)


def test_remaining_rows_have_the_shape_of_the_layer(tmp_path: Path) -> None:
    headers = checkpoint(tmp_path, {"qkv.weight": torch.zeros(4, 16)})
    headers.require_remaining_rows("qkv.weight", (4, 16))
    with pytest.raises(ValueError, match=r"qkv\.weight"):
        headers.require_remaining_rows("qkv.weight", (8, 16))


def test_a_tensor_of_two_files_is_named(tmp_path: Path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"norm": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"2\.safetensors: norm "):
        CheckpointHeaders.read("DIR", [str(file) for file in files])


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, STORED)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        CheckpointHeaders.read("DIR", [str(file)])
