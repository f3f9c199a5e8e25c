"""Claim: a sweep of 2 models × 4 variants as one submitted job costs less wall time than the sum of its single runs.

The single runs are what a user would do by hand: `compress`, then `evaluate`, for each model and variant, each a command of
its own on the same cluster. The second model is the first one with its weights rounded to float16. Perplexities are
compared too: both ways must give the same to the last bit.

    python -m benchmarks.sweep --model DIR --text FILE --dashboard http://127.0.0.1:8265 --address 127.0.0.1:6379
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import timed

VARIANTS: list[dict[str, Any]] = [
    {"name": "swsc3", "projectors": "q,k", "bits": 3},
    {"name": "swsc2", "projectors": "q,k", "bits": 2},
    {"name": "rtn3", "method": "rtn", "projectors": "q,k", "bits": 3},
    {"name": "rtn4", "method": "rtn", "projectors": "q,k", "bits": 4},
]


def main() -> int:
    arguments = parse()
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    models = [Path(arguments.model).absolute(), half_precision_twin(Path(arguments.model), folder / "float16")]
    swept, sweep_seconds = timed(lambda: sweep(models, arguments, folder))
    single, single_seconds = timed(lambda: singles(models, arguments, folder))
    print("| model | variant | perplexity, sweep | perplexity, single |")
    print("|---|---|---|---|")
    for (model, variant), value in single.items():
        print(f"| {Path(model).name} | {variant} | {swept[model, variant]:.4f} | {value:.4f} |")
    print(f"\nsweep {sweep_seconds:.0f} s, sum of the single runs {single_seconds:.0f} s:", end=" ")
    print(f"ratio {sweep_seconds / single_seconds:.2f}; equal to the last bit: {swept == single}")
    return 0 if swept == single and sweep_seconds < single_seconds else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--dashboard", required=True, help="where jobs are submitted")
    parser.add_argument("--address", required=True, help="the same cluster, for the single runs")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    return parser.parse_args()


def half_precision_twin(model: Path, target: Path) -> Path:
    """The same model as another checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def sweep(models: list[Path], arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], float]:
    """All of it as one job."""
    text = {"text": str(Path(arguments.text).absolute()), "seqlen": arguments.seqlen, "windows": arguments.windows}
    config = {"models": [str(m) for m in models], "variants": VARIANTS, "evaluations": [text], "uncompressed": False}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    job = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", arguments.dashboard]
    verb = ["python", "-m", "jobs", "sweep", str(folder / "sweep.yaml"), "--out", str(folder / "results")]
    run([*job, "--working-dir", ".", "--", *verb])
    rows = json.loads((folder / "results" / "results.json").read_text())["rows"]
    return {(row["model"], row["variant"]): row["perplexity"] for row in rows}


def singles(models: list[Path], arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], float]:
    """The same, one command after the other."""
    found = {}
    for model in models:
        for variant in VARIANTS:
            output, result = folder / f"{model.name}-{variant['name']}", folder / "result.json"
            flags = [part for key, value in variant.items() if key != "name" for part in (f"--{key}", str(value))]
            swsc("compress", model, output, *flags, "--address", arguments.address)
            cut = ["--seqlen", arguments.seqlen, "--windows", arguments.windows, "--json", result]
            swsc("evaluate", output, "--text", arguments.text, *cut, "--address", arguments.address)
            found[str(model), variant["name"]] = json.loads(result.read_text())["perplexity"]
    return found


def swsc(*argv: object) -> None:
    run([sys.executable, "-m", "jobs", *map(str, argv)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
