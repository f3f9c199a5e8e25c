"""Matrices of tensors of every layout: read from a file, they are what a plain slice of the tensor gives."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.integrity.digests import range_of, ranges_of
from pipeline.checkpoints.matrix_info import MatrixInfo, expert_matrix, whole_matrix
from pipeline.checkpoints.tensor_io import read_matrix
from pipeline.storage.store import Store
from swsc_core.storage.location import MatrixLocation
from swsc_core.storage.row_blocks import RowBlocks

DENSE = {"a.weight": torch.randn(12, 5), "experts": torch.randn(3, 8, 5)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("model")
    save_file(DENSE, path / "model.safetensors")
    return Store.at(str(path))


@pytest.fixture(scope="module")
def infos(store: Store) -> dict[str, TensorInfo]:
    return {info.name: info for info in read_header(store, "model.safetensors")[1]}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_whole_tensor_and_rows_of_it(store: Store, infos: dict[str, TensorInfo], transposed: bool) -> None:
    whole = whole_matrix(infos["a.weight"], transposed, "q")
    dense = DENSE["a.weight"].T if transposed else DENSE["a.weight"]
    assert (whole.name, whole.shape, whole.role) == ("a.weight", tuple(dense.shape), "q")
    assert whole.location.to_json() == ({"transposed": True} if transposed else {})
    assert whole.fused is whole
    assert torch.equal(read_matrix(store, whole), dense)
    rows = RowBlocks(1, 1, 2, 2)
    piece = whole.piece("k", rows, "k")
    assert (piece.name, piece.shape, piece.role, piece.nbytes) == (
        "a.k.weight",
        (2, dense.shape[1]),
        "k",
        8 * dense.shape[1],
    )
    assert piece.location == MatrixLocation("a.weight", transposed, rows)
    assert (piece.fused.name, piece.rows) == ("a.weight", rows)
    assert torch.equal(read_matrix(store, piece), dense[[1, 3]])


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_and_rows_of_it_read_no_other_expert(
    store: Store, infos: dict[str, TensorInfo], transposed: bool, number: int
) -> None:
    dense = DENSE["experts"][number].T if transposed else DENSE["experts"][number]
    m = len(dense)
    whole = expert_matrix(infos["experts"], number, transposed)
    assert (whole.name, whole.shape, whole.expert) == (f"experts.{number}.weight", tuple(dense.shape), number)
    assert whole.location == MatrixLocation("experts", transposed, RowBlocks(number * m, m, m, 1), 3)
    assert whole.rows is None
    assert torch.equal(read_matrix(store, whole), dense)
    assert ranges_of(whole) == [range_of(infos["experts"].expert(number))]
    piece = whole.piece("up", RowBlocks(0, 1, 2, 2), None)
    assert piece.name == f"experts.{number}.up.weight"
    assert piece.location.row_blocks == RowBlocks(number * m, 1, 2, 2)
    assert (piece.fused, piece.expert) == (whole, number)
    assert ranges_of(piece) == ranges_of(whole)
    assert torch.equal(read_matrix(store, piece), dense[[0, 2]])


def test_pieces_of_one_tensor_share_what_is_read(infos: dict[str, TensorInfo]) -> None:
    whole = whole_matrix(infos["a.weight"])
    pieces: list[MatrixInfo] = [
        whole.piece(name, RowBlocks(first, 4, 12, 1), name) for first, name in ((0, "q"), (4, "k"))
    ]
    assert len({piece.fused for piece in pieces}) == 1
