"""`swsc push OUTPUT ORG/NAME`: an output to the Hugging Face Hub."""

import argparse
from functools import partial

from jobs.flags import add_settings, settings_of
from pipeline.config import ClusterSettings, PushSettings
from pipeline.flows.push import push_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help="directory that compress or restore has written")
    parser.add_argument("repo", metavar="REPO_ID", help="model on the Hub, as ORG/NAME; made if it is not there")
    add_settings(parser, PushSettings, ClusterSettings)


def run(arguments: argparse.Namespace) -> int:
    settings, cluster = settings_of(arguments, PushSettings, ClusterSettings)
    from pipeline.run.cluster import make_pool

    print(
        f"{arguments.model}: pushed, {push_output(arguments.model, arguments.repo, settings, partial(make_pool, cluster, on_cpu=True))}"
    )
    return 0
