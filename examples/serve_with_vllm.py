"""Generate with a compressed model in vLLM, and optionally compare the tokens with transformers on the restored model.

    python examples/serve_with_vllm.py OUTPUT
    swsc restore OUTPUT DENSE && python examples/serve_with_vllm.py OUTPUT --against DENSE --ranks 2

This script needs no code of swsc: vLLM finds the plug-in once swsc is installed beside it (docs/vllm.md).
"""

import argparse
import os
import sys

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time there was a", "def fibonacci(n):"]


def by_vllm(args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Return token ids of the prompts, token ids of the completions, and the completions as text."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; of no effect on a GPU
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=args.dtype,
        tensor_parallel_size=args.ranks,
        max_model_len=args.length,
        enforce_eager=not args.compile,
    )
    done = llm.generate(args.prompt or PROMPTS, SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True))
    completions = [list(one.outputs[0].token_ids) for one in done]
    return [list(one.prompt_token_ids or []) for one in done], completions, [one.outputs[0].text for one in done]


def by_transformers(args: argparse.Namespace, prompts: list[list[int]]) -> list[list[int]]:
    """Token ids of the restored model's greedy completions."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.against, dtype=getattr(torch, args.dtype))
    model.generation_config.eos_token_id = None  # vLLM ignores EOS, too
    asked = {"max_new_tokens": args.tokens, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **asked)[0, len(ids) :].tolist() for ids in prompts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that `swsc compress` wrote")
    parser.add_argument(
        "--against", metavar="DENSE", help="its restored model (`swsc restore`); exit code 1 if tokens differ"
    )
    parser.add_argument("--prompt", action="append", help="prompt; may be repeated")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="maximum tokens of a prompt and its completion")
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel processes or GPUs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes longer to start")
    args = parser.parse_args()
    prompts, completions, texts = by_vllm(args)
    for prompt, text in zip(args.prompt or PROMPTS, texts, strict=True):
        print(f"{prompt}|{text!r}")
    if not args.against:
        return 0
    equal = [ours == theirs for ours, theirs in zip(completions, by_transformers(args, prompts), strict=True)]
    print(f"{sum(equal)} of {len(equal)} prompts: the same {args.tokens} tokens as transformers")
    return 0 if all(equal) else 1


if __name__ == "__main__":  # vLLM starts processes that import this file
    sys.exit(main())
