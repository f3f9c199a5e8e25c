"""Record digests of the files that the commands write, or compare them with a recording.

    python -m benchmarks.golden record FILE.json [--model DIR --calibration FILE --text FILE]
    python -m benchmarks.golden compare FILE.json [the same]

`compare` prints every setting and file that differs. Bytes depend on the processor and the torch version, so compare on
the machine that recorded. The code of the current folder runs.

Good result, exit code 0: `equal`.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import jobs
from benchmarks.golden.commands import record_settings
from benchmarks.golden.digests import Digests, differences, digests_of
from benchmarks.golden.settings import Setting, model_settings, tiny_settings
from benchmarks.golden.sources import make_sources


class Recording(TypedDict):
    """What is recorded: the machine, and digests of the outputs of each setting."""

    machine: dict[str, str]
    outputs: dict[str, Digests]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--model", type=Path, help="also record settings on this model (SmolLM2-135M)")
    parser.add_argument("--calibration", type=Path, help="calibration text for --model")
    parser.add_argument("--text", type=Path, help="evaluation text for --model")
    parser.add_argument("--only", default="", metavar="REGEX", help="only settings whose names match")
    arguments = parser.parse_args()
    if arguments.model and not (arguments.calibration and arguments.text):
        parser.error("--model needs --calibration and --text")
    return arguments


def machine() -> dict[str, str]:
    """Versions and processor features that bytes depend on besides the settings."""
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": sys.version.split()[0],
    }


def record(arguments: argparse.Namespace) -> Recording:
    """Run all settings in a temporary folder. Progress goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        start = Path.cwd()
        links = {name: start / path for name in ("model", "calibration", "text") if (path := getattr(arguments, name))}
        os.chdir(folder)
        try:
            make_sources(Path("sources"))
            for name, target in links.items():
                Path(name).symlink_to(target.absolute())
            outputs: dict[str, Digests] = {"sources": digests_of(Path("sources"))}
            outputs |= _run(tiny_settings(), "sources/test.txt", arguments.only)
            if links:
                outputs |= _run(model_settings("model", "calibration", "text"), "text", arguments.only)
        finally:
            os.chdir(start)
    return {"machine": machine(), "outputs": outputs}


def _run(settings: tuple[Setting, ...], text: str, only: str) -> dict[str, Digests]:
    recorded: dict[str, Digests] = {}
    started = time.monotonic()
    selected = tuple(setting for setting in settings if re.search(only, setting.name))
    for name, digests in record_settings(selected, text):
        recorded[name] = digests
        print(f"{name}: {time.monotonic() - started:.1f} s {digests.get('error', '')}", file=sys.stderr)
        started = time.monotonic()
    return recorded


def main() -> int:
    arguments = parse()
    print(f"code of {Path(jobs.__file__).parent.parent}", file=sys.stderr)
    recording = record(arguments)
    if arguments.verb == "record":
        arguments.file.write_text(json.dumps(recording, indent=1, sort_keys=True), encoding="utf-8")
        failed = [name for name, digests in recording["outputs"].items() if "error" in digests]
        print(f"{len(recording['outputs'])} settings recorded" + (f", failed: {', '.join(failed)}" if failed else ""))
        return 1 if failed else 0
    before = json.loads(arguments.file.read_text(encoding="utf-8"))
    compared = {name: value for name, value in before["outputs"].items() if name in recording["outputs"]}
    lines = list(differences(before["machine"], recording["machine"], "machine"))
    lines += differences(compared, json.loads(json.dumps(recording["outputs"])))
    print("\n".join(sorted(lines)) if lines else f"equal: {len(compared)} settings")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
