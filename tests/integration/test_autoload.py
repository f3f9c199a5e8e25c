"""With the opt-in installed, programs that know nothing of swsc open compressed directories."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main

ROOT = Path(__file__).parents[2]
LOAD = "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained(DIRECTORY).model.layers[0].self_attn.q_proj).__name__)"


@pytest.fixture(scope="module")
def compressed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "compressed"
    assert main(["compress", str(tiny_model), str(output), "--local", "--bits", "4"]) == 0
    return output


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Python takes for site-packages as it starts, with the wheel's two files in it."""
    site = tmp_path_factory.mktemp("site")
    wheel = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(site), str(ROOT / "autoload")]
    subprocess.run([sys.executable, "-m", "pip", "install", *wheel], check=True)
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
    return site


def run(code: str, compressed: Path, *sites: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([*map(str, sites), str(ROOT)])
    code = code.replace("DIRECTORY", repr(str(compressed)))
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_program_that_imports_transformers_alone_opens_it(compressed: Path, installed: Path) -> None:
    assert run(LOAD, compressed, installed).stdout.strip() == "SwscLinear"


def test_without_it_the_same_program_refuses(compressed: Path) -> None:
    ended = run(LOAD, compressed)
    assert ended.returncode != 0
    assert "mismatch" in ended.stderr


def test_a_program_that_does_not_import_transformers_imports_nothing_of_ours(compressed: Path, installed: Path) -> None:
    ended = run(
        "import sys, json; print({'torch', 'transformers', 'swsc_core'} & set(sys.modules))", compressed, installed
    )
    assert ended.stdout.strip() == "set()"
