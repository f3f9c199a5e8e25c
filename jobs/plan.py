"""`swsc plan MODEL`: what would happen, from headers alone."""

import argparse
import math
import os
from collections import Counter
from typing import Any

from jobs.command_line.flags import settings_of, writable
from pipeline.checkpoints.sources.gguf_headers import open_headers
from pipeline.errors import OutputError
from pipeline.models.stored_model import Model
from pipeline.outputs.preflight import examine
from pipeline.planning.cost_model import cached_bytes, estimate_cost, stage_bytes
from pipeline.planning.machine_speed import measure_speed
from pipeline.planning.plan import Decision, Plan, make_plan, require_coverage
from pipeline.report.tables import print_table
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.storage.store import Store


def run(arguments: argparse.Namespace) -> int:
    settings, calibration, cluster, output = settings_of(
        arguments, CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings
    )
    read = [("MODEL", arguments.model), ("--calibration", calibration.calibration), ("--config", arguments.config)]
    target = writable(arguments.json, read) if arguments.json else None
    source = open_headers(arguments.model)
    plan = make_plan(source, settings, dense=settings.format == "dense")
    examine(Model(source, {}), calibration.trust_remote_code)
    stages = stage_bytes(source, plan, settings, calibration)
    foretold = estimate_cost(plan, settings.format, measure_speed(source), _workers(cluster, plan, stages))
    foretold |= {f"{stage}_peak_bytes": nbytes for stage, nbytes in stages.items() if stage != "compress"}
    foretold["disk_bytes"] = foretold["output_bytes"] + cached_bytes(plan, settings)
    free = Store.at(arguments.output).free_bytes() if arguments.output else None
    if free is not None:
        foretold["free_bytes"] = free
    rows = [_row(decision) for decision in plan.decisions]
    if target:
        target.parent.write_json(target.name, {"tensors": rows, "left_out": dict(source.left_out), **foretold})
    print_table(
        [row for row in rows if row["action"] == "compressed"], ["name", "shape", "paper_bits", "bits_per_weight"]
    )
    for (action, reason), count in sorted(Counter((row["action"], row["reason"]) for row in rows).items()):
        print(f"{action} ({reason}): {count} tensors")
    for name, reason in source.left_out:
        print(f"left out: file {name} ({reason})")
    for key, value in foretold.items():
        print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value:,}")
    require_coverage(plan, output.require_coverage)
    if foretold.get("free_bytes", math.inf) < foretold["disk_bytes"]:
        raise OutputError(f"{arguments.output}: the disk has not enough room; free some or choose another")
    return 0


def _workers(cluster: ClusterSettings, plan: Plan, stages: dict[str, int]) -> int:
    """Those that the cluster has room for if one is named, else those that were asked for, else one a core of this machine."""
    tasks = len(plan.layers) + len(plan.copies)
    if cluster.address:
        from pipeline.engine.ray_backend.cluster import workers_for

        return workers_for(cluster, tasks, stages["compress"], later=max(stages.values()))
    return 1 if cluster.local else cluster.workers or min(tasks, len(os.sched_getaffinity(0)))


def _row(decision: Decision) -> dict[str, Any]:
    bits = 8 * decision.stored_bytes / decision.info.count if decision.specs else None
    return {
        "name": decision.info.name,
        "action": decision.action,
        "reason": decision.reason,
        "shape": list(decision.info.shape),
        **decision.location.to_json(),
        "method": decision.specs[0].method if decision.specs else None,
        "bits_per_weight": bits,
        "paper_bits": decision.paper_bits,
    }
