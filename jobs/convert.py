"""`swsc convert FILE.gguf OUTPUT`: a checkpoint that the other verbs read, out of a GGUF file."""

import argparse
from pathlib import Path

from pipeline.errors import OutputError
from pipeline.flows.convert import convert_gguf, quantized_types


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="GGUF file")
    parser.add_argument("output", metavar="OUTPUT", help="new directory, on this machine")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the weights (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    if "://" in arguments.output:
        raise OutputError(f"{arguments.output}: convert writes on this machine only; give a directory and copy it then")
    types = convert_gguf(Path(arguments.file), Path(arguments.output), arguments.dtype)
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
    print(f"{arguments.output}: {sum(types.values())} tensors ({what}) as {arguments.dtype} safetensors")
    if quantized := quantized_types(types):
        print(
            f"dequantized from {', '.join(quantized)}: what is measured on it is measured against a dequantized baseline,"
            " not against the model that was quantized"
        )
    return 0
