"""Claim: in aligned memory equal weights give equal logits under the kernels of any processor, elsewhere to 1e-6 of the largest.

Tiny models of all families, their files shifted by 8, 24 and 40 bytes, under every row of tests/kernels.py, each in a process of
its own; single tokens and a window. Experiment beside it: which bytes of an output, and which digits of a perplexity, depend on
the kernels. One thread.
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
from tests.kernels import KERNELS, VARIABLES, variables_of

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


def verb(*argv: object) -> None:
    """Run one command quietly; RuntimeError with what it said if it fails."""
    from jobs.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if main([str(arg) for arg in argv]):
            raise RuntimeError(said.getvalue())


def outputs(folder: Path) -> dict[str, str]:
    """sha256 of the weights of each form, and the perplexity of the model, as text."""
    import torch

    from tests.tiny import make_text, make_tiny_model

    model = make_tiny_model(folder / "model", dtype=torch.float32)
    text, other = make_text(folder / "text.txt"), make_text(folder / "other.txt", seed=7)
    found = {}
    for form, flags in FORMS.items():
        given = [*flags, text] if "--calibration" in flags else flags
        verb("compress", model, folder / form, "--local", "--include", "proj", *given)
        weights = sorted((folder / form).glob("*.safetensors"))
        found[form] = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()[:8]
    verb("evaluate", model, "--text", other, "--seqlen", 64, "--local", "--json", folder / "e.json")
    return found | {"perplexity": repr(json.loads((folder / "e.json").read_text())["perplexity"])}


def difference(say: Callable[[Any], Any], models: list[Any]) -> float:
    """Largest difference between logits of the first model and those of the others, to the largest logit."""
    wanted, *others = map(say, models)
    return float(max((logits - wanted).abs().max() for logits in others) / wanted.abs().max())


def differences(folder: Path) -> dict[str, float]:
    """Worst of all families: opened by transformers, and in aligned memory; single tokens and a window."""
    import torch

    from swsc_core import align
    from tests.families import MODELS
    from tests.tiny import moved

    def passes(model: Any, ids: Any) -> Any:
        with torch.no_grad():
            return torch.cat([model(input_ids=one).logits.flatten() for one in ids])

    ways = {"window": torch.arange(1, 25)[None, None], "single tokens": torch.arange(1, 25)[:, None, None]}
    worst = {f"{memory}, {way}": 0.0 for memory in ("as the files have it", "aligned") for way in ways}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        made = make()
        made.save_pretrained(folder / name)
        places = [moved(folder / name, folder / f"{name}-{offset}", offset) for offset in OFFSETS]
        models = [type(made).from_pretrained(place).eval() for place in places]
        for key in worst:
            if key.startswith("aligned"):
                for model in models:
                    align(model)
            worst[key] = max(worst[key], difference(partial(passes, ids=ways[key.partition(", ")[2]]), models))
    return worst


def measured(name: str) -> dict[str, Any]:
    """What a process under the kernels `name` finds."""
    own = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, "-m", "benchmarks.kernels", "--child"]
    env = own | dict(variables_of(name)) | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(outputs(Path(folder)) | differences(Path(folder))))
        return 0
    rows = {name: measured(name) for name in KERNELS}
    columns = list(rows["native"])
    print_markdown(["kernels", *columns], ([name, *map(row.get, columns)] for name, row in rows.items()))
    exact = all(value == 0 for row in rows.values() for key, value in row.items() if key.startswith("aligned"))
    near = all(value <= 1e-6 for row in rows.values() for key, value in row.items() if key.startswith("as the"))
    return int(not (exact and near))


if __name__ == "__main__":
    raise SystemExit(main())
