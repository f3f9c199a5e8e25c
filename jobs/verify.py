"""`swsc verify OUTPUT`: compare every file of an output with its manifest."""

import argparse

from jobs.command_line.flags import cluster_of
from pipeline.verbs.verify import VerifyRequest, verify


def run(arguments: argparse.Namespace) -> int:
    result = verify(VerifyRequest(arguments.model, cluster_of(arguments)))
    print(f"{arguments.model}: {result.files} files, {result.nbytes:,} bytes, all match the manifest")
    return 0
