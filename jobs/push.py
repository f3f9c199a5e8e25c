"""`swsc push OUTPUT ORG/NAME`: an output to the Hugging Face Hub."""

import argparse

from jobs.command_line.flags import settings_of
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.push import PushSettings
from pipeline.verification.push import push_output


def run(arguments: argparse.Namespace) -> int:
    settings, cluster = settings_of(arguments, PushSettings, ClusterSettings)
    from pipeline.engine.ray_backend.worker_pools import worker_pools

    with worker_pools(cluster) as pools:
        print(f"{arguments.model}: pushed, {push_output(arguments.model, arguments.repo, settings, pools)}")
    return 0
