"""Claim: a sweep of 2 models × 4 variants as one submitted job takes less wall time than the sum of its single runs.

    python -m benchmarks.sweep --model DIR --text FILE --dashboard http://127.0.0.1:8265 --address 127.0.0.1:6379

A single run is `compress` and then `evaluate` for one model and variant, each a separate command on the same cluster.
The second model is the first one with its weights rounded to float16.

Good result, exit code 0: the sweep takes less time, and all perplexities are equal to the last bit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.common import timed

VARIANTS: list[dict[str, str | int]] = [
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
    parser.add_argument("--dashboard", required=True, help="URL that jobs are submitted to")
    parser.add_argument("--address", required=True, help="address of the same cluster, for the single runs")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    return parser.parse_args()


def half_precision_twin(model: Path, target: Path) -> Path:
    """The same model in float16, as another checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def sweep(models: list[Path], arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], float]:
    """Perplexities of all models and variants, from one submitted job."""
    text = {"text": str(Path(arguments.text).absolute()), "seqlen": arguments.seqlen, "windows": arguments.windows}
    config = {"models": [str(m) for m in models], "variants": VARIANTS, "evaluations": [text], "uncompressed": False}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    job = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", arguments.dashboard]
    verb = ["python", "-m", "jobs", "sweep", str(folder / "sweep.yaml"), "--out", str(folder / "results")]
    run([*job, "--working-dir", ".", "--", *verb])
    rows = json.loads((folder / "results" / "results.json").read_text())["rows"]
    return {(row["model"], row["variant"]): row["perplexity"] for row in rows}


def singles(models: list[Path], arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], float]:
    """Perplexities of all models and variants, from one command after the other."""
    perplexities = {}
    for model in models:
        for variant in VARIANTS:
            output, result = folder / f"{model.name}-{variant['name']}", folder / "result.json"
            flags = [part for key, value in variant.items() if key != "name" for part in (f"--{key}", str(value))]
            swsc("compress", model, output, *flags, "--address", arguments.address)
            cut = ["--seqlen", arguments.seqlen, "--windows", arguments.windows, "--json", result]
            swsc("evaluate", output, "--text", arguments.text, *cut, "--address", arguments.address)
            perplexities[str(model), str(variant["name"])] = json.loads(result.read_text())["perplexity"]
    return perplexities


def swsc(*argv: object) -> None:
    run([sys.executable, "-m", "jobs", *map(str, argv)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
