"""`swsc restore OUTPUT DENSE`: compressed model in, plain dense checkpoint out."""

import argparse
from functools import partial

from jobs.flags import add_settings, cluster_of
from pipeline.config import ClusterSettings
from pipeline.flows.restore import restore_model
from pipeline.flows.verify import verify_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUTPUT", help="directory of a compressed model")
    parser.add_argument("dense", metavar="DENSE", help="directory to write")
    add_settings(parser, ClusterSettings)
    parser.add_argument("--verify", action="store_true", help="first hash OUTPUT's files, as `swsc verify` does")
    parser.add_argument("--overwrite", action="store_true", help="replace another output, or a damaged one")


def run(arguments: argparse.Namespace) -> int:
    from pipeline.run.cluster import make_pool

    pools = partial(make_pool, cluster_of(arguments))
    if arguments.verify:
        verify_output(arguments.model, pools)
    report = restore_model(arguments.model, arguments.dense, pools, arguments.overwrite)
    restored = sum(row["action"] == "restored" for row in report["tensors"])
    print(f"{arguments.dense}: {restored} of {len(report['tensors'])} tensors restored, the others copied")
    return 0
