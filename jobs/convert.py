"""`swsc convert FILE OUTPUT`: convert a GGUF file into a safetensors checkpoint that the other verbs read."""

import argparse

from pipeline.verbs.convert import ConvertRequest, convert


def run(arguments: argparse.Namespace) -> int:
    result = convert(ConvertRequest(arguments.file, arguments.output, arguments.dtype))
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(result.tensors.items()))
    count = sum(result.tensors.values())
    print(f"{arguments.output}: {count} tensors ({types}) as {arguments.dtype} safetensors")
    if result.baseline:
        print(
            f"dequantized from {result.baseline}: figures measured on it compare with this dequantized baseline, not"
            " with the model before its quantization"
        )
    return 0
