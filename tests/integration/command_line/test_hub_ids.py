"""Models by their Hub id, from a server that stands in for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.checkpoints.checkpoint import MANIFEST
from tests.support.hub_server import REPO, client_of, hub
from tests.support.project import ROOT
from tests.support.tiny import contents


def swsc(home: Path, endpoint: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    offline = {"HF_HUB_OFFLINE": "0" if endpoint else "1"}
    environment = {**os.environ, "HF_HOME": str(home), **offline, **({"HF_ENDPOINT": endpoint} if endpoint else {})}
    command = [sys.executable, "-m", "jobs", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_of_the_hub_is_compressed_as_the_same_on_a_disk_and_found_again_without_a_network(
    tiny_model: Path, tmp_path: Path
) -> None:
    served = Path(shutil.copytree(tiny_model, tmp_path / "served"))
    (served / "pytorch_model.bin").write_bytes(b"a pickle")
    (served / "modeling_tiny.py").write_text("raise SystemExit('code of somebody else')")
    (served / "original").mkdir()
    (served / "original" / "params.json").write_text("{}")
    (served / "additional_chat_templates").mkdir()
    (served / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    flags = ["--local", "--bits", "4"]
    with hub(served) as endpoint:
        done = swsc(tmp_path / "home", endpoint, "compress", REPO, str(tmp_path / "out"), *flags)
    assert done.returncode == 0, done.stderr
    assert main(["compress", str(served), str(tmp_path / "straight"), *flags]) == 0
    of_hub, of_disk = contents(tmp_path / "out"), contents(tmp_path / "straight")
    card = of_hub.pop("README.md").decode()
    assert f"base_model: {REPO}\n" in card  # the one thing that a disk does not know
    assert "base_model" not in of_disk.pop("README.md").decode()
    of_hub.pop(MANIFEST), of_disk.pop(MANIFEST)  # it has the hash of the card
    assert of_hub == of_disk
    template = "additional_chat_templates/tool_use.jinja"
    assert (tmp_path / "out" / template).read_text() == "{{ tools }}"
    again = swsc(tmp_path / "home", "", "plan", f"{REPO}@main")
    assert again.returncode == 0, again.stderr
    fetched = {path.name for path in (tmp_path / "home").rglob("*")}
    assert "config.json" in fetched
    assert not fetched & {"pytorch_model.bin", "params.json"}
    assert "modeling_tiny.py" in of_hub, "code goes with its model, and was not run"


def test_a_downloaded_model_is_held_against_what_the_hub_publishes(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, home = ["--local", "--bits", "4", "--verify-source", "hub"], tmp_path / "home"
    with hub(tiny_model) as endpoint, client_of(endpoint, home):
        assert main(["compress", REPO, str(tmp_path / "good"), *argv]) == 0
        shard = next(path for path in home.rglob("model-00002-of-*.safetensors")).resolve()
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.chmod(0o644)
        shard.write_bytes(data)
        assert main(["compress", REPO, str(tmp_path / "bad"), *argv]) == 2
    assert "model-00002-of" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_what_is_neither_a_directory_nor_to_be_had_is_one_line_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "org/unknown"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: org/unknown: ")
    assert "`hf download org/unknown`" in error
    assert error.count("\n") == 1
