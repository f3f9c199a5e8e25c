"""A process that is killed while it writes a card into an output.

The next command finds a complete output and tidies up.
"""

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.cli import main
from pipeline.outputs.atomic_edit import complete_interrupted_edit, edit_file
from pipeline.storage.store import Store
from tests.support.tiny import contents


def measured(card: str) -> str:
    return card if "added by the test" in card else card + "added by the test"


def killed_while_editing(output: Path, at: int) -> bool:
    """Whether a process that edits the card was alive at its operation number `at`, where it is killed (SIGKILL)."""
    process = os.fork()
    if process == 0:
        count = 0

        def counted(inner: Any, first: bool) -> Any:
            def call(*arguments: Any) -> None:
                nonlocal count
                count += 1
                if not first:
                    inner(*arguments)
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if first:
                    inner(*arguments)

            return call

        os.replace, os.fsync = counted(os.replace, first=True), counted(os.fsync, first=False)
        with suppress(BaseException):
            edit_file(Store.at(str(output)), "README.md", measured)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def left(output: Path) -> list[str]:
    return [str(path) for path in output.rglob("*") if path.name.endswith(".partial") or path.name == ".swsc"]


def test_a_process_killed_while_it_writes_a_card_leaves_an_output_that_verifies_and_is_tidied(
    tiny_model: Path, made: Path, tmp_path: Path
) -> None:
    straight, output = Path(shutil.copytree(made, tmp_path / "straight")), tmp_path / "out"
    edit_file(Store.at(str(straight)), "README.md", measured)
    at, seen = 0, set()
    while True:
        at += 1
        shutil.copytree(made, output)
        if not killed_while_editing(output, at):
            break
        seen |= {Path(name).name.split(".")[0] for name in left(output) if name.endswith(".partial")}
        assert main(["verify", str(output), "--local"]) == 0
        if at % 3 == 0:  # every third state, by another verb that writes there
            assert main(["compress", str(tiny_model), str(output), "--local"]) == 0
        else:
            complete_interrupted_edit(Store.at(str(output)))
        assert left(output) == []
        assert contents(output) in (contents(made), contents(straight))
        edit_file(Store.at(str(output)), "README.md", measured)
        assert contents(output) == contents(straight)
        shutil.rmtree(output)
    assert seen >= {"README", "swsc_manifest", "amending"}
