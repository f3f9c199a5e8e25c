"""Outputs that are pushed to the Hub, to a server that stands in for it.

In a new process where the client's own output counts.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline import VERSION
from tests.support.hub_server import PushedHub, Repo, client_of, pushed_hub
from tests.support.project import ROOT
from tests.support.tiny import contents

TOKEN, REPO = "hf_SecretOfTheTest", "org/tiny-swsc"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card and a file whose name is a pattern."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("pushed") / "model"))
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (path / "odd [name]*.txt").write_text("kept")
    return path


@pytest.fixture
def hub() -> Iterator[PushedHub]:
    with pushed_hub(TOKEN) as server:
        yield server


Ended = subprocess.CompletedProcess[str]
InProcess = Callable[..., Ended]


def swsc(home: Path, address: str, *argv: str, **more: str) -> Ended:
    """Run a verb, in a new process, as somebody who is logged in by the environment; `more` of it wins."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, **more}
    command = [sys.executable, "-m", "jobs", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def in_process(
    hub: PushedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[InProcess]:
    """The same in this process, against `hub`."""

    def run(*argv: str, token: str = TOKEN) -> Ended:
        monkeypatch.setenv("HF_TOKEN", token)
        capfd.readouterr()
        code = main([*argv, "--local"])
        return Ended(argv, code, *capfd.readouterr())

    with client_of(hub.address, tmp_path / "home"):
        yield run


def files_of(output: Path) -> dict[str, bytes]:
    return contents(output) | {"swsc_report.json": (output / "swsc_report.json").read_bytes()}


def error_of(done: Ended) -> str:
    """The one line of an error; lines of the Hub's client do not count."""
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_pushed_files_are_those_on_the_disk(output: Path, hub: PushedHub, tmp_path: Path) -> None:
    (output / "notes.txt").write_text("of somebody, and none of the output's")
    done = swsc(tmp_path / "home", hub.address, "push", str(output), REPO, "--local")
    assert done.returncode == 0, done.stderr
    assert f"{output}: pushed, {hub.address}/{REPO}/commit/" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    repo = hub.repos[REPO]
    expected = files_of(output)
    del expected["notes.txt"]
    assert repo.branches == {"main": expected}
    assert (repo.private, repo.messages) == (False, [f"Output of swsc {VERSION}"])
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, data in repo.branches["main"].items():
        (fetched / name).write_bytes(data)
    assert main(["verify", str(fetched), "--local"]) == 0


def test_a_second_push_sends_what_is_new_and_removes_tensor_files_of_the_first(
    output: Path, hub: PushedHub, in_process: InProcess, tiny_model: Path, tmp_path: Path
) -> None:
    assert in_process("push", str(output), REPO).returncode == 0
    hub.repos[REPO].branches["main"]["picture.png"] = b"of somebody"
    hub.sent.clear()
    assert main(["compress", str(tiny_model), str(tmp_path / "q"), "--local", "--projectors", "q"]) == 0
    done = in_process("push", str(tmp_path / "q"), REPO, "--message", "Q alone")
    assert done.returncode == 0, done.stderr
    there = hub.repos[REPO].branches["main"]
    new = files_of(tmp_path / "q")
    assert {name: there[name] for name in new} == new
    assert there["picture.png"] == b"of somebody"
    assert {name for name in there if name.endswith(".safetensors")} == {n for n in new if n.endswith(".safetensors")}
    assert len(hub.sent) < sum(name.endswith(".safetensors") for name in new)
    assert hub.repos[REPO].messages[-1] == "Q alone"


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_of_somebody_else_is_not_replaced(
    output: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path, weights: str
) -> None:
    """For example MODEL's own repository. A new branch replaces nothing."""
    before = {weights: b"weights", "README.md": b"a card"}
    hub.repos[REPO] = Repo(branches={"main": dict(before), "old": dict(before)})
    for branch in ("", "main", "old"):
        done = in_process("push", str(output), REPO, *(["--revision", branch] * bool(branch)))
        assert done.returncode == 2
        assert "not an output" in error_of(done)
    assert hub.repos[REPO].branches == {"main": before, "old": before}
    assert hub.sent == []
    assert in_process("push", str(output), REPO, "--revision", "swsc").returncode == 0
    removed = weights.endswith(".safetensors")  # files of other kinds stay, and are not read beside those of the output
    assert hub.repos[REPO].branches["swsc"] == files_of(output) | ({} if removed else {weights: b"weights"})
    assert hub.repos[REPO].branches["main"] == before


@pytest.mark.parametrize("name", ["tokenizer.json", "swsc_report.json", "swsc_manifest.json"])
def test_a_link_is_never_followed(
    output: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path, name: str
) -> None:
    """Not even one to the very bytes that were written."""
    (output / name).rename(tmp_path / "elsewhere")
    (output / name).symlink_to(tmp_path / "elsewhere")
    done = in_process("push", str(output), REPO)
    assert done.returncode == 1
    assert f"{name} is a link" in error_of(done)
    assert hub.repos == {}


def test_a_branch_of_a_private_repository(output: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path) -> None:
    flags = ["--private", "--revision", "q-and-k"]
    done = in_process("push", str(output), REPO, *flags)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    assert hub.repos[REPO].branches == {"main": {}, "q-and-k": files_of(output)}


def test_private_is_never_made_public_by_a_repository_that_is_there(
    output: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path
) -> None:
    assert in_process("push", str(output), REPO).returncode == 0
    hub.repos[REPO].branches["main"].clear()
    done = in_process("push", str(output), REPO, "--private")
    assert done.returncode == 2
    assert f"{REPO}: the repository exists and is public" in error_of(done)
    assert hub.repos[REPO].branches == {"main": {}}


def test_compress_pushes_at_the_end(tiny_model: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path) -> None:
    argv = ["compress", str(tiny_model), str(tmp_path / "out"), "--push", REPO, "--private"]
    done = in_process(*argv)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    assert hub.repos[REPO].branches["main"] == files_of(tmp_path / "out")


def test_what_is_damaged_or_not_finished_is_refused_by_name_and_nothing_is_sent(
    output: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path
) -> None:
    config = output / "config.json"
    config.write_text(config.read_text().replace("64", "46", 1))
    done = in_process("push", str(output), REPO)
    assert (done.returncode, "config.json: content differs" in error_of(done)) == (1, True)
    (output / "swsc_manifest.json").unlink()
    done = in_process("push", str(output), REPO)
    assert (done.returncode, "no swsc_manifest.json" in error_of(done)) == (2, True)
    assert not hub.repos


@pytest.mark.parametrize("verb", ["push", "compress"])
def test_a_push_without_a_login_is_an_error_with_the_remedy_before_any_work(
    tiny_model: Path, output: Path, hub: PushedHub, in_process: InProcess, tmp_path: Path, verb: str
) -> None:
    new = tmp_path / "new"
    argv = {"push": ["push", str(output), REPO], "compress": ["compress", str(tiny_model), str(new), "--push", REPO]}
    done = in_process(*argv[verb], token="")
    assert done.returncode == 2
    assert "not logged in to the Hub; run `hf auth login`, or set HF_TOKEN" in error_of(done)
    assert not new.exists()
    assert not hub.repos


def test_a_token_that_is_refused_and_a_hub_that_is_not_reached_are_one_line(
    output: Path, hub: PushedHub, tmp_path: Path
) -> None:
    hub.token = "hf_another"
    done = swsc(tmp_path / "home", hub.address, "push", str(output), REPO, "--local")
    assert (done.returncode, "401" in error_of(done)) == (1, True)
    done = swsc(tmp_path / "home", "http://127.0.0.1:9", "push", str(output), REPO, "--local")
    assert (done.returncode, "check the network" in error_of(done)) == (1, True)
    assert not hub.repos


def test_a_token_that_would_be_quoted_by_the_client_is_refused_without_it(
    output: Path, hub: PushedHub, tmp_path: Path
) -> None:
    done = swsc(tmp_path / "home", hub.address, "push", str(output), REPO, "--local", HF_TOKEN=f"{TOKEN}\x01")
    assert (done.returncode, "the token of the Hub has invalid characters" in error_of(done)) == (2, True)


@pytest.mark.parametrize("repo", ["tiny", "org/tiny@main", "../tiny", "https://huggingface.co/org/tiny"])
def test_what_is_no_id_is_refused(output: Path, capsys: pytest.CaptureFixture[str], repo: str) -> None:
    assert main(["push", str(output), repo, "--local"]) == 2
    assert f"error: {repo}: not the id of a model on the Hub; give ORG/NAME" in capsys.readouterr().err


def test_offline_mode_is_respected(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(output), REPO, "--local"]) == 2  # the tests run in it
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_private_without_push_is_a_mistake(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), "--local", "--private"]) == 2
    assert "private: only applies with --push" in capsys.readouterr().err
