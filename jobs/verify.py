"""`swsc verify OUTPUT`: is every byte as it was written?"""

import argparse

from jobs.command_line.flags import cluster_of
from pipeline.verification.flow import verify_output


def run(arguments: argparse.Namespace) -> int:
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    with worker_pools(cluster_of(arguments)) as pools:
        found = verify_output(arguments.model, pools)
    print(f"{arguments.model}: {found['files']} files, {found['bytes']:,} bytes, all as they were written")
    return 0
