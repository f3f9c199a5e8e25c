"""`swsc restore OUTPUT DENSE`: restore a compressed model to a plain dense checkpoint."""

import argparse

from jobs.command_line.flags import cluster_of
from jobs.command_line.results import print_restoration
from pipeline.restoring.flow import RestoreOptions
from pipeline.verbs.restore import RestoreRequest, restore


def run(arguments: argparse.Namespace) -> int:
    options = RestoreOptions(arguments.overwrite, arguments.adapter, arguments.trust_remote_code)
    cluster = cluster_of(arguments)
    print_restoration(restore(RestoreRequest(arguments.model, arguments.dense, options, arguments.verify, cluster)))
    return 0
