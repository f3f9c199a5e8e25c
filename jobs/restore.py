"""`swsc restore OUTPUT DENSE`: compressed model in, plain dense checkpoint out."""

import argparse
from typing import Any

from jobs.command_line.flags import cluster_of
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.restoring.flow import restore_model
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths
from pipeline.verification.flow import verify_output


def run(arguments: argparse.Namespace) -> int:
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    require_disjoint_paths(UserPath.at("DENSE", arguments.dense), user_paths([("OUTPUT", arguments.model)]))
    with worker_pools(cluster_of(arguments)) as pools:
        if arguments.verify:
            verify_output(arguments.model, pools)
        report = restore_model(
            arguments.model, arguments.dense, pools, arguments.overwrite, arguments.adapter, arguments.trust_remote_code
        )
    restored = [row for row in report["tensors"] if row["action"] == "restored"]
    print(f"{arguments.dense}: {len(restored)} of {len(report['tensors'])} tensors restored, the others copied")
    if arguments.adapter:
        _tell_of_adapter(arguments.dense, restored)
    return 0


def _tell_of_adapter(dense: str, restored: list[dict[str, Any]]) -> None:
    """Without the adapter the model is not what was compressed: that is said, and what the adapter does not hold."""
    carried = sum(ADAPTER_FOLDER in row["reason"] for row in restored)
    whole = [row["name"] for row in restored if "whole" in row["reason"]]
    print(
        f"{dense}/{ADAPTER_FOLDER}: the low-rank part of {carried} of them, as a LoRA adapter that belongs on top (PEFT)"
    )
    if whole:
        print(f"note: {len(whole)} restored whole, as an adapter sits on linear layers alone: {', '.join(whole[:4])}")
