"""Bits that change on a disk, in a memory or on the way, where it is known what they were.

Never an output of other weights.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.checkpoints.integrity.digests import (
    file_digests,
    known_ranges,
    match_file_names,
    parse_sha256sums,
    require_same_ranges,
    with_digests,
)
from pipeline.checkpoints.source import open_checkpoint
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.store import Store
from pipeline.variants import compress as flow
from tests.support.tiny import contents, make_text

FLAGS = ["--bits", "4", "--local"]
WEIGHT, COPIED = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def right(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the tiny model."""
    output = tmp_path_factory.mktemp("right") / "output"
    assert main(["compress", str(tiny_model), str(output), *FLAGS]) == 0
    return output


@pytest.fixture
def sums(tiny_model: Path, tmp_path: Path) -> Path:
    """Hashes of the tiny model, as sha256sum writes them, and those of other files."""
    files = sorted(tiny_model.glob("*"))
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()} {' *'[n % 2]}{file.name}" for n, file in enumerate(files)
    ]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return tmp_path / "SHA256SUMS"


@pytest.fixture
def flip(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, range], None]:
    """Has some of the readings of one tensor, counted from 0, give other bytes."""

    def change(tensor: str, which: range) -> None:
        info, real, count = open_checkpoint(str(tiny_model)).tensors[tensor], LocalFiles.read, iter(range(1 << 30))

        def read(self: LocalFiles, path: str, start: int, length: int) -> bytearray:
            data = real(self, path, start, length)
            whole = start <= info.start and info.start + info.nbytes <= start + length
            if Path(path) == tiny_model / info.file and whole and next(count) in which:
                data[info.start - start + 6] ^= 4
            return data

        monkeypatch.setattr(LocalFiles, "read", read)

    return change


def test_every_report_row_names_the_digests_of_its_sources(tiny_model: Path, right: Path) -> None:
    source = open_checkpoint(str(tiny_model))
    rows = {row["name"]: row for row in json.loads((right / "swsc_report.json").read_text())["tensors"]}
    compressed = [row for row in rows.values() if row["action"] == "compressed"]
    assert compressed
    for row in compressed:
        ((where, digest),) = row["source_sha256"].items()
        info = source.tensors[row["name"]]
        assert where == f"{info.file}:{info.start}-{info.start + info.nbytes}"
        assert digest == hashlib.sha256(source.store.read(info.file, info.start, info.nbytes)).hexdigest()


def test_known_hashes_change_no_byte(tiny_model: Path, right: Path, sums: Path, tmp_path: Path) -> None:
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS, "--verify-source", str(sums)]) == 0
    assert contents(tmp_path / "out") == contents(right)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace(text[:4], "beef", 1) if text[:4] != "beef" else text, ""),
        (lambda text: "".join(line for line in text.splitlines(True) if "00002-of" not in line), "00002-of"),
        (lambda text: text + "md5 of something\n", "line"),
        (lambda text: text.replace("model-00001", "other/model-00001"), "model-00001"),
    ],
)
def test_hashes_of_other_files_end_before_any_work(
    change: Callable[[str], str], named: str, tiny_model: Path, sums: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lines = sorted(sums.read_text().splitlines(), key=lambda line: ".safetensors" not in line or "index" in line)
    sums.write_text(change("\n".join(lines) + "\n"))
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS, "--verify-source", str(sums)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hashes", ["hub", "no-such-file", "."])
def test_hashes_that_are_not_to_be_had_are_a_mistake(hashes: str, tiny_model: Path, tmp_path: Path) -> None:
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS, "--verify-source", hashes]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tensor", [WEIGHT, COPIED])
def test_a_bit_that_flips_once_after_the_check_is_read_again_and_one_that_stays_ends_the_run(
    tensor: str, tiny_model: Path, right: Path, sums: Path, tmp_path: Path, flip: Callable[[str, range], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def argv(output: str) -> list[str]:
        return ["compress", str(tiny_model), str(tmp_path / output), *FLAGS, "--verify-source", str(sums)]

    whole_file_reads = 1  # that of the check, which holds the tensor in one piece
    flip(tensor, range(whole_file_reads, whole_file_reads + 1))
    assert main(argv("once")) == 0
    assert contents(tmp_path / "once") == contents(right)
    flip(tensor, range(whole_file_reads, 1 << 30))
    assert main(argv("stays")) == 1
    assert tensor in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "stays" / MANIFEST).exists()


def test_what_was_finished_from_other_bytes_is_made_again_when_they_are_known(
    tiny_model: Path, right: Path, sums: Path, tmp_path: Path, flip: Callable[[str, range], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    argv = ["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(flow, "finish", interrupted)
        flip(WEIGHT, range(1 << 30))
        assert main(argv) == 130
    monkeypatch.undo()
    assert main([*argv, "--verify-source", str(sums)]) == 0
    assert contents(tmp_path / "out") == contents(right)


@pytest.mark.parametrize("verb", ["restore", "evaluate"])
def test_an_output_that_is_damaged_is_not_read_as_if_it_were_whole(
    verb: str, right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(right, tmp_path / "output"))
    info = open_checkpoint(str(output)).tensors[COPIED]
    data = bytearray((output / info.file).read_bytes())
    data[info.start + 9] ^= 8
    (output / info.file).write_bytes(data)
    argv = {
        "restore": ["restore", str(output), str(tmp_path / "other")],
        "evaluate": ["evaluate", str(output), "--text", str(make_text(tmp_path / "text")), "--seqlen", "64"],
    }[verb]
    assert main([*argv, "--local"]) == 1
    assert COPIED in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "other" / MANIFEST).exists()


def test_digests_of_a_file_are_those_of_its_parts(tiny_model: Path) -> None:
    source = open_checkpoint(str(tiny_model))
    file = source.tensors[WEIGHT].file
    own = {name: info for name, info in source.tensors.items() if info.file == file}
    found = file_digests(source.store, file, own.values())
    data = (tiny_model / file).read_bytes()
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    for name, info in own.items():
        assert found.tensors[name] == (hashlib.sha256(data[info.start : info.start + info.nbytes]).hexdigest(),)
    assert known_ranges(with_digests(own, found.tensors)).keys() == {
        f"{file}:{info.start}-{info.start + info.nbytes}" for info in own.values()
    }


def test_digests_of_a_stack_are_those_of_its_matrices_too(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from pipeline.checkpoints.checkpoint import read_header

    save_file({"experts": torch.randn(3, 4, 5), "bias": torch.randn(7)}, tmp_path / "model.safetensors")
    store = Store.at(str(tmp_path))
    infos = {info.name: info for info in read_header(store, "model.safetensors")[1]}
    found = file_digests(store, "model.safetensors", infos.values()).tensors
    stack = with_digests(infos, found)["experts"]
    assert len(found["experts"]) == 4
    for number in range(3):
        matrix = stack.expert(number)
        own = hashlib.sha256(store.read(matrix.file, matrix.start, matrix.nbytes)).hexdigest()
        assert matrix.sha256 == (own,)


def test_two_readings_of_a_range_are_compared() -> None:
    from pipeline.errors import StoreError

    require_same_ranges("m", {"a": "1", "b": "2"}, {"a": "1", "c": "3"})
    with pytest.raises(StoreError, match="two readings of b differ"):
        require_same_ranges("m", {"a": "1", "b": "2"}, {"b": "3"})


def test_sums_are_read_as_sha256sum_writes_them() -> None:
    digest = "Ab" * 32
    assert parse_sha256sums(f"{digest}  ./a b.safetensors\n\n{digest} *c\n", "sums") == {
        "a b.safetensors": digest.lower(),
        "c": digest.lower(),
    }


def test_sums_may_name_files_by_a_path_to_them() -> None:
    sums = {"/data/m/a": "1", "/data/m/b/c": "2", "x/a": "3", "y/b/c": "4", "xa": "5"}
    assert match_file_names(sums, ["a", "b/c"]) == {"a": "1", "b/c": "2"}
    for others in (
        {"a": "1", "x/b/c": "2"},
        {"x/a": "1", "y/b/c": "2"},
        {f"{at}/{n}": at for at in "xy" for n in ("a", "b/c")},
    ):
        assert match_file_names(others, ["a", "b/c"]) == others  # not of one directory


def test_sums_taken_outside_of_the_model_do(tiny_model: Path, right: Path, tmp_path: Path) -> None:
    files = sorted(tiny_model.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}\n" for file in files]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    known = ["--verify-source", str(tmp_path / "SHA256SUMS")]
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *FLAGS, *known]) == 0
    assert contents(tmp_path / "out") == contents(right)
