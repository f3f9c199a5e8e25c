"""Claims about aligned memory: the same values, copied only if they are not aligned, ties kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.tensor_io import StoredTensor, read_tensor, to_stored_tensor, to_tensor
from pipeline.storage.store import Store
from swsc_core.storage.alignment import ALIGNMENT, align, aligned, is_aligned
from swsc_core.storage.safetensors_header import DTYPES
from tests.support.tiny import moved


def placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, `offset` bytes past a multiple of ALIGNMENT."""
    memory = torch.empty(values.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT + offset
    found = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    return found.copy_(values)


KINDS = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


@given(
    offset=st.integers(0, ALIGNMENT // 8 - 1), kind=st.sampled_from(KINDS), rows=st.integers(1, 5), turned=st.booleans()
)
def test_aligned_holds_the_same_and_copies_only_what_begins_elsewhere(
    offset: int, kind: torch.dtype, rows: int, turned: bool
) -> None:
    given_ = placed(torch.arange(rows * 8).reshape(rows, 8).to(kind), 8 * offset)
    given_ = given_.T if turned else given_
    found = aligned(given_)
    assert is_aligned(found)
    assert torch.equal(found, given_)
    assert found.stride() == given_.stride()
    assert (found is given_) == (offset == 0)


def test_what_is_empty_or_on_no_cpu_stays_as_it_is() -> None:
    for tensor in (torch.empty(0), torch.empty(3, device="meta")):
        assert aligned(tensor) is tensor


def test_a_model_is_aligned_in_place_and_what_is_tied_stays_tied() -> None:
    layers = (nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model: Any = nn.Sequential(*layers).requires_grad_(False)
    model[0].weight.data = placed(torch.randn(4, 4), 8)
    model[1].weight = model[0].weight  # one parameter
    model[2].weight.data = model[0].weight.data  # another one, in the same memory
    model[3].running_mean = placed(torch.randn(4), 24)
    own, values = model[0].weight, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert align(model) == 4 * 16 + 4 * 4
    assert model[0].weight is own is model[1].weight
    assert model[2].weight.data_ptr() == own.data_ptr()
    assert all(is_aligned(tensor) for tensor in model.state_dict().values())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert align(model) == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (5, 9)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3", "I64"])
def test_a_part_from_any_buffer_is_copied_to_an_aligned_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    nbytes = int(np.prod(shape)) * DTYPES[dtype][1]
    memory = np.arange(nbytes + 8, dtype=np.uint8)
    memory.flags.writeable = False  # as the object store gives it
    tensor = to_tensor(StoredTensor("x", dtype, shape, memory[8:]))
    assert is_aligned(tensor)
    assert tensor.shape == shape
    assert np.array_equal(to_stored_tensor("x", tensor).data, memory[8:])
    before = memory.copy()
    tensor.zero_()
    assert np.array_equal(memory, before)


def test_tensors_that_are_read_are_aligned_wherever_the_file_has_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"t{rows}": torch.randn(rows, 3) for rows in range(1, 30)}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    for offset in (0, 8, 56):
        store = Store(str(moved(tmp_path / "model", tmp_path / str(offset), offset)))
        for info in read_header(store, "model.safetensors")[1]:
            found = read_tensor(store, info)
            assert is_aligned(found)
            assert torch.equal(found, tensors[info.name])
