"""A run whose storage fails once, at each of its operations in turn: what is broken is never taken for whole."""

from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from pipeline.storage import lease, store
from pipeline.storage.local_files import LocalFiles
from tests.support.faults import MODES, FaultyFiles
from tests.support.tiny import contents, make_tiny_model

FLAGS = ["--local", "--projectors", "q,k", "--clusters", "4", "--rank", "1", "--n-init", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("one") / "model", layers=1)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("straight") / "out"
    assert compress(model, output) == 0
    return contents(output)


def compress(model: Path, output: Path) -> int:
    return main(["compress", str(model), str(output), *FLAGS])


@pytest.mark.parametrize("mode", MODES)
def test_every_failure_is_reported_and_the_same_command_completes_the_output(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(lease, "_RENEWAL_SECONDS", 60.0)  # no operations of another thread among those that are counted
    number, codes = 0, []
    while True:
        number += 5 if mode == "slow" else 1
        faulty = FaultyFiles(LocalFiles(), mode, number)
        monkeypatch.setattr(store, "files_at", lambda scheme, files=faulty: files)
        place = tmp_path / str(number)
        codes.append(compress(model, place))
        monkeypatch.setattr(store, "files_at", lambda scheme: LocalFiles())
        if faulty.count < number:
            break
        assert codes[-1] in (0, 1, 2)
        if (place / MANIFEST).exists() and main(["verify", str(place), "--local"]) == 0:
            assert contents(place) == expected
        elif codes[-1] == 0:
            raise AssertionError(f"operation {number} broke the output without an error")
        assert compress(model, place) == 0
        assert contents(place) == expected
    assert main(["verify", str(place), "--local"]) == 0
    assert number > (60 if mode in ("fail", "slow") else 15)
    assert (1 in codes) == (mode != "slow")
