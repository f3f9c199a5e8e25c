"""`swsc verify OUTPUT`: is every byte as it was written?"""

import argparse
from functools import partial

from jobs.flags import cluster_of
from pipeline.flows.verify import verify_output


def run(arguments: argparse.Namespace) -> int:
    from pipeline.run.cluster import make_pool

    found = verify_output(arguments.model, partial(make_pool, cluster_of(arguments), on_cpu=True))
    print(f"{arguments.model}: {found['files']} files, {found['bytes']:,} bytes, all as they were written")
    return 0
