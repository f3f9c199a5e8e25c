"""Record digests of what the commands write, or compare them with a recording.

    python -m benchmarks.golden record FILE.json [--model DIR --calibration FILE --text FILE]
    python -m benchmarks.golden compare FILE.json [the same]

`compare` prints every setting and file that differs and exits 1. Bytes depend on processor and torch version: compare on the
machine that recorded. The code that runs is that of the current folder.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import jobs
from benchmarks.golden.commands import record_settings
from benchmarks.golden.digests import differences, digests_of
from benchmarks.golden.settings import Setting, model_settings, tiny_settings
from benchmarks.golden.sources import make_sources


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--model", type=Path, help="also record settings on this model (SmolLM2-135M)")
    parser.add_argument("--calibration", type=Path, help="calibration text for --model")
    parser.add_argument("--text", type=Path, help="evaluation text for --model")
    parser.add_argument("--only", default="", metavar="REGEX", help="settings whose names match")
    arguments = parser.parse_args()
    if arguments.model and not (arguments.calibration and arguments.text):
        parser.error("--model needs --calibration and --text")
    return arguments


def machine() -> dict[str, Any]:
    """What bytes depend on beside the settings."""
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": sys.version.split()[0],
    }


def record(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all settings in a temporary folder; progress goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        place = Path.cwd()
        links = {name: place / path for name in ("model", "calibration", "text") if (path := getattr(arguments, name))}
        os.chdir(folder)
        try:
            make_sources(Path("sources"))
            for name, target in links.items():
                Path(name).symlink_to(target.absolute())
            found = {"sources": digests_of(Path("sources"))}
            found |= _run(tiny_settings(), "sources/test.txt", arguments.only)
            if links:
                found |= _run(model_settings("model", "calibration", "text"), "text", arguments.only)
        finally:
            os.chdir(place)
    return {"machine": machine(), "outputs": found}


def _run(settings: tuple[Setting, ...], text: str, only: str) -> dict[str, Any]:
    recorded, started = {}, time.monotonic()
    chosen = tuple(setting for setting in settings if re.search(only, setting.name))
    for name, digests in record_settings(chosen, text):
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
    chosen = {name: value for name, value in before["outputs"].items() if name in recording["outputs"]}
    lines = list(differences(before["machine"], recording["machine"], "machine"))
    lines += differences(chosen, json.loads(json.dumps(recording["outputs"])))
    print("\n".join(sorted(lines)) if lines else f"equal: {len(chosen)} settings")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
