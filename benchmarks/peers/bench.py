"""One row of the table: quantize in the tool's environment, evaluate the dense checkpoint, delete it.

Each row has a folder named by its key. `peer.json` marks a quantized row, `evaluation.json` a finished one. Both are
written atomically, so that an interrupted run can be resumed.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import python_of, requirements
from benchmarks.peers.rows import PEERS, Row, key
from swsc_core.storage.json_fields import JsonObject

ROOT = Path(__file__).parents[2]
# Exit code of a script whose tool does not support the settings.
REFUSED = 2
UNCOMPRESSED: JsonObject = {
    "tool": "uncompressed",
    "version": "",
    "settings": {},
    "bits_per_weight": None,
    "cpu_seconds": None,
    "peak_rss": None,
}


class RowFailure(Exception):
    """A row without figures, with a reason of one line. `refused`: the tool does not support the settings."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


@dataclass(frozen=True)
class Bench:
    """Settings that all rows share.

    Attributes:
        common: what the key of a row depends on, besides the row's own settings.
        protocol: flags of `jobs evaluate`.
        keep: keep the dense checkpoints.
    """

    model: str
    include: str
    tokens: Path
    common: JsonObject
    protocol: tuple[str, ...]
    out: Path
    environments: Path
    keep: bool

    def result(self, row: Row | None) -> dict[str, Any]:
        """Figures of a row, from its folder if it is finished. None stands for the uncompressed model.

        Raises:
            RowFailure: the tool refused or failed; log.txt of the row has the full output.
        """
        name = key(row, self.common, self._requirements(row))
        folder = self.out / "rows" / f"{row.label if row else 'uncompressed'}-{name}"
        if not (folder / "evaluation.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if row and not ((folder / "peer.json").is_file() and (folder / "model").is_dir()):
                self._quantize(row, folder)
            self._evaluate(folder / "model" if row else Path(self.model), folder)
        if not self.keep:
            shutil.rmtree(folder / "model", ignore_errors=True)
        peer = read(folder / "peer.json") if row else UNCOMPRESSED
        return {"key": name, "peer": peer, "evaluation": read(folder / "evaluation.json"), "common": self.common}

    def _requirements(self, row: Row | None) -> str:
        environment = PEERS[row.peer].environment if row else None
        return requirements(environment) if environment else ""

    def _quantize(self, row: Row, folder: Path) -> None:
        (folder / "peer.json").unlink(missing_ok=True)  # the checkpoint is rewritten now
        shutil.rmtree(folder / "model", ignore_errors=True)
        peer = PEERS[row.peer]
        python = python_of(peer.environment, self.environments) if peer.environment else Path(sys.executable)
        command = [str(python), "-m", f"benchmarks.peers.{peer.script}", self.model, str(folder), *row.flags]
        command += ["--calibration", str(self.tokens), "--bits", str(row.bits), f"--group-size={row.group_size}"]
        run([*command, "--include", self.include], folder / "log.txt", refusable=True)

    def _evaluate(self, model: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "jobs", "evaluate", str(model), *self.protocol]
        run([*command, "--json", str(folder / "evaluation.json")], folder / "evaluation-log.txt")


def run(command: list[str], log: Path, refusable: bool = False) -> None:
    """Run a command in the project's root, without access to the Hub. Its output goes to `log`.

    Raises:
        RowFailure: with the last line of `log`. If `refusable`, exit code 2 means that the tool refused.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)  # it would mix two environments
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        refused = refusable and code == REFUSED
        raise RowFailure(last if refused else f"exit code {code}: {last}; see {log}", refused)


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))
