"""Run the commands of a setting in this process and collect digests of what they write."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.golden.digests import Digests, digests_of, stable
from benchmarks.golden.settings import Setting
from jobs.cli import main

LOG = Path("commands.log")


class CommandFailed(Exception):
    """A verb of a setting ended with another exit code than 0."""


def swsc(*argv: str) -> None:
    """Run a verb. Its output goes to the log.

    Raises:
        CommandFailed: the exit code is not 0; the message ends with the last lines of the log.
    """
    with LOG.open("a", encoding="utf-8") as log:
        print("$ swsc", *argv, file=log, flush=True)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = main(list(argv))
    if code:
        raise CommandFailed(f"swsc {' '.join(argv)}: exit code {code}\n{LOG.read_text(encoding='utf-8')[-2000:]}")


def record_setting(setting: Setting, text: str) -> Digests:
    """Digests of all files that the commands of `setting` write in the current folder. The files are removed.

    Returns:
        For each verb the digests of its output, or the stable part of its JSON.
    """
    try:
        swsc("compress", setting.model, "out", *setting.flags.split(), "--local")
        swsc("verify", "out", "--local")
        steps = {name: step for name, step in _STEPS.items() if name in setting.then}
        return {"compress": digests_of(Path("out")), **{name: step(setting, text) for name, step in steps.items()}}
    finally:
        for name in ("out", "dense", "adapter", "again", ".swsc-cache"):
            shutil.rmtree(name, ignore_errors=True)


def _plan(setting: Setting, text: str) -> Any:
    swsc("plan", setting.model, *setting.flags.split(), "--json", "plan.json")
    return stable(json.loads(Path("plan.json").read_text()))


def _restore(setting: Setting, text: str) -> Any:
    swsc("restore", "out", "dense", "--local")
    return digests_of(Path("dense"))


def _adapter(setting: Setting, text: str) -> Any:
    swsc("restore", "out", "adapter", "--adapter", "--local")
    return digests_of(Path("adapter"))


def _evaluate(setting: Setting, text: str) -> Any:
    flags = ("--seqlen", "128", "--windows", "2", "--json", "figures.json", "--local")
    swsc("evaluate", "out", "--text", text, *flags)
    return stable(json.loads(Path("figures.json").read_text()))


def _open(setting: Setting, text: str) -> Any:
    """Digests of the logits of the output in transformers, and of what `save_pretrained` writes.

    Saved weights are compared tensor by tensor, because their order in the file varies.
    """
    import transformers

    import swsc_core.hf  # noqa: F401 - registers the format

    torch.set_num_threads(1)
    config = json.loads(Path("out/config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained("out").eval()
    model.save_pretrained("again")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 25)[None]).logits.float()
    tensors = {name: _bytes_digest(tensor) for name, tensor in load_file("again/model.safetensors").items()}
    saved = {**digests_of(Path("again")), "model.safetensors": tensors}
    return {"logits": _bytes_digest(logits), "saved": saved}


def _bytes_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


_STEPS: dict[str, Callable[[Setting, str], Any]] = {
    "plan": _plan,
    "restore": _restore,
    "adapter": _adapter,
    "evaluate": _evaluate,
    "open": _open,
}


def record_settings(settings: tuple[Setting, ...], text: str) -> Iterator[tuple[str, Digests]]:
    """Name and digests of one setting after the other; {"error": …} for a setting that fails."""
    for setting in settings:
        try:
            yield setting.name, record_setting(setting, text)
        except (Exception, SystemExit) as error:
            yield setting.name, {"error": f"{type(error).__name__}: {error}"}
