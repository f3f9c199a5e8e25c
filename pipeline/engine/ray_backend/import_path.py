"""Import path of Ray's workers: they import this tool's packages, whatever the working directory holds."""

from pathlib import Path

from ray.job_config import JobConfig

import pipeline

# Packages that workers import.
_PACKAGES = ("pipeline", "swsc_core")


def import_path_options(folder: Path) -> dict[str, JobConfig]:
    """Return arguments of `ray.init` for a driver whose working directory is `folder`.

    Ray puts the driver's working directory first on the import path of its workers. Where `folder` has modules of our
    names (a clone that the tool was installed from, or a user's own), the directory of our packages takes its place. A
    node that lacks this directory imports its own installation.
    """
    home = Path(pipeline.__file__).resolve().parents[1]
    if folder.resolve() == home or not _has_package(folder):
        return {}
    # Ray adds no working directory for a job of its client, which this is not. That flag has no other effect on a job
    # without a runtime environment.
    return {"job_config": JobConfig(_client_job=True, _py_driver_sys_path=[str(home)])}


def _has_package(folder: Path) -> bool:
    modules = (path for name in _PACKAGES for path in (folder / name / "__init__.py", folder / f"{name}.py"))
    return any(path.exists() for path in modules)
