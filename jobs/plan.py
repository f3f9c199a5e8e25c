"""`swsc plan MODEL`: what would happen, from headers alone."""

import argparse
import math
from collections import Counter
from typing import Any

from jobs.flags import add_config, add_settings, settings_of, writable
from pipeline.config import CalibrationSettings, CompressSettings, OutputSettings
from pipeline.errors import OutputError
from pipeline.model.checkpoint import open_checkpoint
from pipeline.model.forecast import forecast
from pipeline.model.plan import Decision, make_plan, require_coverage
from pipeline.model.store import Store
from pipeline.report.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="directory of a safetensors checkpoint, here or at s3://… or gs://…; or a Hub id"
    )
    add_config(parser)
    add_settings(parser, CompressSettings, CalibrationSettings, OutputSettings)
    parser.add_argument("--output", metavar="DIR", help="also say whether the disk of DIR has room")
    parser.add_argument("--json", metavar="FILE", help="also write the plan there")


def run(arguments: argparse.Namespace) -> int:
    settings, _, output = settings_of(arguments, CompressSettings, CalibrationSettings, OutputSettings)
    source = open_checkpoint(arguments.model)
    plan = make_plan(source, settings)
    foretold = forecast(plan, settings.format)
    free = Store.at(arguments.output).free_bytes() if arguments.output else None
    if free is not None:
        foretold["free_bytes"] = free
    rows = [_row(decision) for decision in plan.decisions]
    if arguments.json:
        target = writable(arguments.json)
        target.parent.write_json(target.name, {"tensors": rows, **foretold})
    print_table(
        [row for row in rows if row["action"] == "compressed"], ["name", "shape", "paper_bits", "bits_per_weight"]
    )
    for (action, reason), count in sorted(Counter((row["action"], row["reason"]) for row in rows).items()):
        print(f"{action} ({reason}): {count} tensors")
    for key, value in foretold.items():
        print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value:,}")
    require_coverage(plan, output.require_coverage)
    if foretold.get("free_bytes", math.inf) < foretold["output_bytes"]:
        raise OutputError(f"{arguments.output}: the disk has not enough room; free some or choose another")
    return 0


def _row(decision: Decision) -> dict[str, Any]:
    bits = 8 * decision.stored_bytes / decision.info.count if decision.specs else None
    return {
        "name": decision.info.name,
        "action": decision.action,
        "reason": decision.reason,
        "shape": list(decision.info.shape),
        "method": decision.specs[0].method if decision.specs else None,
        "bits_per_weight": bits,
        "paper_bits": decision.paper_bits,
    }
