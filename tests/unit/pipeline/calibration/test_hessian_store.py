"""Claims about the files of Hessians: which matrices are in which, and which of them are complete."""

import pickle

import pytest

from pipeline.calibration import hessian_store
from pipeline.calibration.hessian_store import (
    HessianPart,
    HessianRow,
    Hessians,
    StoredHessian,
    complete,
    layer_parts,
    stored_in,
)
from pipeline.checkpoints.matrix_info import MatrixInfo, whole_matrix
from pipeline.outputs.existing_output import FinishedFile
from pipeline.storage.store import FileRecord, Store
from tests.unit.pipeline.planning.test_plan import LAYERS, checkpoint_of

INFOS = [whole_matrix(info) for info in checkpoint_of(LAYERS).tensors.values()]
Q, K, V = (info.name for info in INFOS[:3])


def stored(name: str, owner: str, file: str = "f") -> StoredHessian:
    return StoredHessian(file, HessianRow(name, 5, owner, f"{name}'s"))


def names_of(parts: list[list[HessianPart]]) -> list[list[tuple[str, ...]]]:
    return [[part.names for part in layer] for layer in parts]


def test_a_layer_is_one_file() -> None:
    parts = layer_parts(INFOS)
    assert names_of(parts) == [[tuple(info.name for info in INFOS[3 * layer : 3 * layer + 3])] for layer in range(12)]
    files = [part.file for layer in parts for part in layer]
    assert len(set(files)) == 12
    assert files[0].startswith("model.layers.0-")


def test_a_large_layer_has_several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_store, "_FILE_BYTES", 2 * 8 * 64**2)
    first = layer_parts(INFOS)[0]
    assert [part.names for part in first] == [(Q, K), (V,)]
    assert len({part.file for part in first}) == 2


def test_other_matrices_of_a_layer_have_another_file() -> None:
    """Without this, a run for V would replace the file that a run for Q and K has written."""
    files = [layer_parts(infos)[0][0].file for infos in (INFOS[:2], INFOS[2:3], INFOS[:3], INFOS[:2])]
    assert len(set(files)) == 3
    assert files[0] == files[3]


def test_a_matrix_is_complete_with_the_hessian_of_its_owner() -> None:
    assert complete([stored(Q, Q), stored(K, Q)]).keys() == {Q, K}
    assert complete([stored(K, Q)]).keys() == set()
    assert complete([stored(V, K), stored(K, Q), stored(Q, Q)]).keys() == {K, Q}, "K stores no unweighted Hessian"


@pytest.mark.parametrize("reverse", [False, True])
def test_of_two_files_of_a_matrix_the_complete_one_counts(reverse: bool) -> None:
    """An owner's file holds its unweighted Hessian, which other matrices need."""
    found = [stored(K, Q, "lost owner"), stored(K, K, "own")]
    assert complete(found[::-1] if reverse else found)[K].file == "own"
    found = [stored(V, Q, "lost owner"), stored(V, K, "complete"), stored(K, K)]
    assert complete(found[::-1] if reverse else found)[V].file == "complete"


def test_files_of_an_earlier_release_hold_one_matrix_and_are_its_digest() -> None:
    row = {"name": Q, "tokens": 5, "owner": Q}
    old = FinishedFile(FileRecord(f"{Q}.safetensors", 8, "0" * 64), [row])
    new = FinishedFile(FileRecord("l-0.safetensors", 8, "1" * 64), [{**row, "name": K, "sha256": "2" * 64}])
    assert stored_in({"q": old, "k": new}) == [
        StoredHessian("q", HessianRow(Q, 5, Q, "0" * 64)),
        StoredHessian("k", HessianRow(K, 5, Q, "2" * 64)),
    ]


def test_a_task_carries_the_records_of_its_matrices_and_of_their_owners() -> None:
    all_of_them = Hessians(Store("/cache"), 0.5, {name: stored(name, Q) for name in (Q, K, V)})
    own = all_of_them.of([K])
    assert own.stored.keys() == {Q, K}
    assert own == all_of_them, "the same cache"
    assert own.sha256(K) == all_of_them.sha256(K) != all_of_them.sha256(Q)
    assert pickle.loads(pickle.dumps(own)).tokens(K) == 5


def test_the_matrices_of_all_layers_are_in_one_part_each() -> None:
    infos: list[MatrixInfo] = sorted(INFOS, key=lambda info: info.name, reverse=True)
    parts = [name for layer in layer_parts(infos) for part in layer for name in part.names]
    assert sorted(parts) == sorted(LAYERS)
