"""Compare two models: their perplexity on a text, and how often they predict the same next token.

    python -m examples.compare_two_models DENSE COMPRESSED --text TEXT.txt --prompt "The capital of France is"

Either directory may be dense or compressed. Perplexity is that of `swsc evaluate`. Agreement has two figures: the share
of positions at which both models rank the same token first, and the length of the common prefix of their greedy
completions.
"""
# some functions of transformers and torch have no type annotations
# mypy: allow-untyped-calls

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import swsc_core.hf  # noqa: F401  registers the format with transformers
from pipeline.engine.ray_backend.worker_pools import worker_pools
from pipeline.errors import SwscError
from pipeline.evaluation.flow import evaluate_model
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.texts.windows import make_windows


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        perplexities: one per model.
        agreement: share of positions with the same top-1 token.
        common_prefixes: tokens that both greedy completions start with, per prompt.
    """

    perplexities: list[float]
    agreement: float
    common_prefixes: list[int]


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Evaluate both models and print the comparison."""
    args = _arguments(argv)
    logging.disable_progress_bar()
    directories = (args.first, args.second)

    # 1. Perplexity of each model: the function behind `swsc evaluate`, as a local loop.
    settings = EvaluateSettings(text=args.text, seqlen=args.seqlen, windows=args.windows)
    with worker_pools(ClusterSettings(local=True)) as pools:
        perplexities = [evaluate_model(directory, settings, pools)["perplexity"] for directory in directories]
    for directory, value in zip(directories, perplexities, strict=True):
        print(f"{directory}: perplexity {value:.3f} on {args.windows} windows of {args.seqlen} tokens of {args.text}")

    # 2. Both models on the same text: how often do they rank the same next token first?
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in directories]
    windows = [torch.from_numpy(make_windows(directory, settings).ids) for directory in directories]
    if not torch.equal(*windows):
        raise SystemExit(
            f"error: {args.first} and {args.second} tokenise the text differently; compare models with one tokenizer"
        )
    share = agreement(models[0], models[1], windows[0])
    print(f"top-1 agreement: {100 * share:.2f}% of {windows[0].numel()} positions")

    # 3. Greedy completions of both, and where they diverge.
    tokenizer = AutoTokenizer.from_pretrained(args.first)
    prefixes = []
    for prompt in args.prompt:
        completions = [greedy(model, tokenizer, prompt, args.tokens) for model in models]
        prefixes.append(common_prefix(*completions))
        print(f"> {prompt}: the same for {prefixes[-1]} tokens")
        for directory, ids in zip(directories, completions, strict=True):
            print(f"  {directory}: {tokenizer.decode(ids)!r}")
    return Comparison(perplexities, share, prefixes)


@torch.no_grad()
def agreement(first: Any, second: Any, windows: torch.Tensor) -> float:
    """Share of the positions of `windows`, int64 [count, seqlen], at which both models rank the same token first."""
    equal = 0
    for window in windows:
        tops = [model(input_ids=window[None], use_cache=False).logits.argmax(-1) for model in (first, second)]
        equal += int((tops[0] == tops[1]).sum())
    return equal / windows.numel()


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> list[int]:
    """Token ids of the greedy completion of `prompt`."""
    encoded = tokenizer(prompt, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return [int(token) for token in output[0, ids.shape[1] :]]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(first), len(second)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="FIRST", help="directory of a dense or compressed model")
    parser.add_argument("second", metavar="SECOND", help="directory of another form of the same model")
    parser.add_argument("--text", required=True, metavar="TEXT", help="text file to evaluate on")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to complete with both models; may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=20, help="tokens per completion (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="number of windows (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except SwscError as error:
        raise SystemExit(f"error: {error}") from None
