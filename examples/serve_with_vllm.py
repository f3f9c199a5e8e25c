"""Generate with a compressed model in vLLM, and optionally compare the tokens with transformers on the restored model.

    python examples/serve_with_vllm.py OUTPUT
    swsc restore OUTPUT DENSE && python examples/serve_with_vllm.py OUTPUT --against DENSE --ranks 2

This script imports nothing from this package. vLLM finds the plug-in once the package is installed beside it
(docs/vllm.md).
"""

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time there was a", "def fibonacci(n):"]


@dataclass(frozen=True)
class Completion:
    """Token ids of a prompt, and token ids and text of its completion."""

    prompt_ids: list[int]
    ids: list[int]
    text: str


def complete_with_vllm(args: argparse.Namespace) -> list[Completion]:
    """Greedy completions of all prompts."""
    # in GB; without effect on a GPU
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=args.dtype,
        tensor_parallel_size=args.ranks,
        max_model_len=args.length,
        enforce_eager=not args.compile,
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    outputs = llm.generate(args.prompt or PROMPTS, sampling)
    return [
        Completion(list(output.prompt_token_ids or []), list(output.outputs[0].token_ids), output.outputs[0].text)
        for output in outputs
    ]


def complete_with_transformers(args: argparse.Namespace, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Token ids of the restored model's greedy completions."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.against, dtype=getattr(torch, args.dtype))
    model.generation_config.eos_token_id = None  # vLLM ignores EOS, too
    options = {"max_new_tokens": args.tokens, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompt_ids]


def main() -> int:
    args = _arguments()
    completions = complete_with_vllm(args)
    for prompt, completion in zip(args.prompt or PROMPTS, completions, strict=True):
        print(f"{prompt}|{completion.text!r}")
    if not args.against:
        return 0
    references = complete_with_transformers(args, [completion.prompt_ids for completion in completions])
    equal = [completion.ids == ids for completion, ids in zip(completions, references, strict=True)]
    print(f"{sum(equal)} of {len(equal)} prompts: the same {args.tokens} tokens as transformers")
    return 0 if all(equal) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="OUTPUT", help="output directory of `swsc compress`")
    parser.add_argument(
        "--against", metavar="DENSE", help="its restored model (`swsc restore`); exit code 1 if tokens differ"
    )
    parser.add_argument("--prompt", action="append", help="prompt; may be repeated")
    parser.add_argument("--tokens", type=int, default=20, help="tokens per completion (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=256, help="maximum tokens of prompt and completion (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel processes or GPUs (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which takes longer to start")
    return parser.parse_args()


if __name__ == "__main__":  # vLLM starts processes that import this file
    sys.exit(main())
