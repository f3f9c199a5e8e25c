"""Workers import this tool's packages, also if the working directory has modules of the same names."""

from pathlib import Path

import pytest

from pipeline.engine.ray_backend.import_path import import_path_options
from tests.support.project import ROOT


@pytest.mark.parametrize("module", ["pipeline/__init__.py", "swsc_core/__init__.py", "swsc_core.py"])
def test_our_folder_replaces_a_working_directory_with_modules_of_our_names(tmp_path: Path, module: str) -> None:
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).touch()
    job = import_path_options(tmp_path)["job_config"]
    assert job._py_driver_sys_path == [str(ROOT)]
    assert job._client_job  # Ray then adds no working directory


def test_any_other_working_directory_is_left_to_ray(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()  # without modules it hides nothing
    assert import_path_options(tmp_path) == {}
    assert import_path_options(ROOT) == {}
