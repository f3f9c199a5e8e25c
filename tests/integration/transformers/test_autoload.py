"""With the opt-in installed, programs that know nothing of swsc open compressed directories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.cli import main
from tests.support.offline_tasks import make_tasks
from tests.support.project import ROOT
from tests.support.tiny import make_tiny_model

LOAD = (
    "from transformers import AutoModelForCausalLM as A; "
    "print(type(A.from_pretrained(DIRECTORY).model.layers[0].self_attn.q_proj).__name__)"
)

GONE = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "swsc_core":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Gone())
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    model = make_tiny_model(folder / "model", dtype=torch.float32)
    assert main(["compress", str(model), str(folder / "compressed"), "--local", "--bits", "6"]) == 0
    return folder / "compressed"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Python treats as site-packages at its start, with the wheel's two files in it."""
    site = tmp_path_factory.mktemp("site")
    wheel = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(site), str(ROOT / "autoload")]
    subprocess.run([sys.executable, "-m", "pip", "install", *wheel], check=True)
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
    return site


def run(code: str, compressed: Path, *sites: Path) -> subprocess.CompletedProcess[str]:
    return python(["-c", code.replace("DIRECTORY", repr(str(compressed)))], *sites)


def python(argv: list[str], *sites: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, sites), str(ROOT)])}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment)


def test_a_program_that_imports_transformers_alone_opens_it(compressed: Path, installed: Path) -> None:
    assert run(LOAD, compressed, installed).stdout.strip() == "SwscLinear"


def test_lm_eval_as_it_is_finds_the_numbers_of_evaluate(compressed: Path, installed: Path, tmp_path: Path) -> None:
    """It runs the compressed layers, evaluate the restored weights.

    What is counted is equal, what is added up equal but for rounding.
    """
    tasks, names = make_tasks(tmp_path / "tasks"), ["tiny_choice", "tiny_rolling"]
    flags = ["--tasks", ",".join(names), "--include_path", str(tasks), "--output_path", str(tmp_path / "lm_eval")]
    stock = ["--model", "hf", "--model_args", f"pretrained={compressed},dtype=float32", "--device", "cpu", *flags]
    ended = python(["-m", "lm_eval", "run", *stock], installed)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(next((tmp_path / "lm_eval").rglob("results_*.json")).read_text())["results"]
    argv = ["evaluate", str(compressed), "--tasks", ",".join(names), "--include-path", str(tasks), "--local"]
    assert main([*argv, "--json", str(tmp_path / "ours.json")]) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())["lm_eval"]["results"]
    figures = {(task, metric): value for task in names for metric, value in ours[task].items() if "," in metric}
    assert len(figures) > 4
    for (task, metric), value in figures.items():
        exact = metric.startswith(("acc", "exact_match")) or isinstance(value, str)
        assert found[task][metric] == (value if exact else pytest.approx(value, rel=1e-5)), (task, metric)


def test_without_it_the_same_program_refuses(compressed: Path) -> None:
    ended = run(LOAD, compressed)
    assert ended.returncode != 0
    assert "mismatch" in ended.stderr


def test_a_program_that_does_not_import_transformers_imports_nothing_of_ours(compressed: Path, installed: Path) -> None:
    ended = run(
        "import sys, json; print({'torch', 'transformers', 'swsc_core'} & set(sys.modules))", compressed, installed
    )
    assert ended.stdout.strip() == "set()"


def test_with_swsc_uninstalled_transformers_still_works_and_names_the_missing_package(
    compressed: Path, installed: Path
) -> None:
    ended = run(GONE + "from transformers import PreTrainedModel as A; print(A.__name__)", compressed, installed)
    assert ended.stdout.strip() == "PreTrainedModel", ended.stderr
    assert "swsc-autoload: swsc is not installed" in ended.stderr
