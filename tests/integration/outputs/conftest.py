"""An output that most tests of this folder read or damage. A file that needs another model overrides `model`."""

import shutil
from pathlib import Path

import pytest

from tests.support.commands import compress


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    """The model that `made` is compressed from; read only."""
    return tiny_model


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output; read only."""
    output = tmp_path_factory.mktemp("made") / "out"
    assert compress(model, output) == 0
    return output


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))
