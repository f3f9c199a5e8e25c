"""`swsc convert FILE.gguf OUTPUT`: a checkpoint that the other verbs read, out of a GGUF file."""

import argparse
from pathlib import Path

from pipeline.checkpoints.sources.gguf import convert_gguf
from pipeline.errors import OutputError
from pipeline.storage.paths import UserPath, require_disjoint_paths, user_paths


def run(arguments: argparse.Namespace) -> int:
    if "://" in arguments.output:
        raise OutputError(f"{arguments.output}: convert writes on this machine only; give a directory and copy it then")
    require_disjoint_paths(UserPath.at("OUTPUT", arguments.output), user_paths([("FILE", arguments.file)]))
    made = convert_gguf(Path(arguments.file), arguments.output, arguments.dtype)
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(made.types.items()))
    print(f"{arguments.output}: {sum(made.types.values())} tensors ({what}) as {arguments.dtype} safetensors")
    if made.baseline:
        print(
            f"dequantized from {made.baseline}: what is measured on it is measured against a dequantized baseline,"
            " not against the model that was quantized"
        )
    return 0
