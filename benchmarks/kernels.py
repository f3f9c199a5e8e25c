"""Claim: in aligned memory, equal weights give equal logits under the kernels of any processor.

    python -m benchmarks.kernels

Opens tiny models of all families from files whose bytes are shifted by 8, 24 and 40, under every row of
tests/support/kernels.py, each in its own process with one thread, and compares logits of single tokens and of a window.
Also reports, as an experiment, which bytes of an output and which digits of a perplexity depend on the kernels.

Good result, exit code 0: no difference in aligned memory; elsewhere at most 5e-7 of the largest logit for windows and
2e-6 for single tokens.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import print_markdown
from tests.support.kernels import KERNELS, VARIABLES, variables_of

_SHARED = ["--clusters", "16", "--segment-size", "4", "--scaled", "--rank", "2", "--factor-bits", "8"]
_CALIBRATED = ["--bits", "3", "--calibration-windows", "4", "--calibration-seqlen", "64", "--calibration"]
FORMS = {
    "round to nearest": ["--method", "rtn", "--bits", "4"],
    "paper": ["--bits", "6"],
    "segments": _SHARED,
    "calibrated": ["--preset", "fast", *_CALIBRATED],
    "tuned": ["--preset", "best", *_CALIBRATED],
}
OFFSETS = (0, 8, 24, 40)
LIMITS = {
    "as the files have it, window": 5e-7,
    "as the files have it, single tokens": 2e-6,
    "aligned, window": 0.0,
    "aligned, single tokens": 0.0,
}


def verb(*argv: object) -> None:
    """Run one command without output. Raises RuntimeError with its output if it fails."""
    from jobs.cli import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if main([str(arg) for arg in argv]):
            raise RuntimeError(output.getvalue())


def make_inputs(folder: Path) -> None:
    """Write a model and two texts for all processes, because random numbers depend on the kernels too."""
    import torch

    from tests.support.tiny import make_text, make_tiny_model

    make_tiny_model(folder / "model", dtype=torch.float32)
    make_text(folder / "text.txt"), make_text(folder / "other.txt", seed=7)


def outputs(inputs: Path, folder: Path) -> dict[str, str]:
    """sha256 of the weights of each form, and the perplexity of the model with all digits."""
    model, text, other = inputs / "model", inputs / "text.txt", inputs / "other.txt"
    digests = {}
    for form, flags in FORMS.items():
        given = [*flags, text] if "--calibration" in flags else flags
        verb("compress", model, folder / form, "--local", "--include", "proj", *given)
        weights = sorted((folder / form).glob("*.safetensors"))
        digests[form] = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()[:8]
    verb("evaluate", model, "--text", other, "--seqlen", 64, "--local", "--json", folder / "e.json")
    return digests | {"perplexity": repr(json.loads((folder / "e.json").read_text())["perplexity"])}


def difference(logits_of: Callable[[Any], Any], models: list[Any]) -> float:
    """Largest difference of logits between the first model and the others, relative to the largest logit."""
    expected, *others = map(logits_of, models)
    return float(max((logits - expected).abs().max() for logits in others) / expected.abs().max())


def differences(folder: Path) -> dict[str, float]:
    """Largest relative differences over all families, in the memory of the files and in aligned memory."""
    import torch

    from swsc_core import align
    from tests.support.families import MODELS
    from tests.support.tiny import moved

    def passes(model: Any, ids: Any) -> Any:
        with torch.no_grad():
            return torch.cat([model(input_ids=batch).logits.flatten() for batch in ids])

    inputs = {"window": torch.arange(1, 25)[None, None], "single tokens": torch.arange(1, 25)[:, None, None]}
    worst = dict.fromkeys(LIMITS, 0.0)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(folder / name)
        places = [moved(folder / name, folder / f"{name}-{offset}", offset) for offset in OFFSETS]
        models = [type(model).from_pretrained(place).eval() for place in places]
        for key in worst:
            if key.startswith("aligned"):
                for opened in models:
                    align(opened)
            worst[key] = max(worst[key], difference(partial(passes, ids=inputs[key.partition(", ")[2]]), models))
    return worst


def measured(name: str, inputs: str) -> dict[str, str | float]:
    """Digests and differences of a process with the kernels `name`."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, "-m", "benchmarks.kernels", "--child", inputs]
    env = inherited | dict(variables_of(name)) | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.child:
            print(json.dumps(outputs(given.child, Path(folder)) | differences(Path(folder))))
            return 0
        make_inputs(Path(folder))
        rows = {name: measured(name, folder) for name in KERNELS}
    columns = list(rows["native"])
    print_markdown(["kernels", *columns], ([name, *map(row.get, columns)] for name, row in rows.items()))
    return int(any(float(row[key]) > limit for row in rows.values() for key, limit in LIMITS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
