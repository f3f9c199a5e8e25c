"""Compare two models: their perplexity on a text, and how often they predict the same next token.

    python -m examples.compare_two_models DENSE COMPRESSED --text TEXT.txt --prompt "The capital of France is"

Either directory may be dense or compressed. Perplexity is that of `swsc evaluate`. Agreement has two figures: the share of
positions at which both models rank the same token first, and the length of the common prefix of their greedy completions.
"""

import argparse
from collections.abc import Sequence
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate both models and print the comparison; return perplexities, top-1 agreement and common prefix lengths."""
    given = _arguments(argv)
    logging.disable_progress_bar()
    places = (given.first, given.second)

    # 1. Perplexity of each model: the function behind `swsc evaluate`, as a local loop.
    settings = EvaluateSettings(text=given.text, seqlen=given.seqlen, windows=given.windows)
    with worker_pools(ClusterSettings(local=True)) as pools:
        perplexities = [evaluate_model(place, settings, pools)["perplexity"] for place in places]
    for place, value in zip(places, perplexities, strict=True):
        print(f"{place}: perplexity {value:.3f} on {given.windows} windows of {given.seqlen} tokens of {given.text}")

    # 2. Both models on the same text: how often do they rank the same next token first?
    models = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]
    windows = [torch.from_numpy(make_windows(place, settings).ids) for place in places]
    if not torch.equal(*windows):
        raise SystemExit(
            f"error: {given.first} and {given.second} tokenise the text differently; compare models with one tokenizer"
        )
    share = agreement(models[0], models[1], windows[0])
    print(f"top-1 agreement: {100 * share:.2f}% of {windows[0].numel()} positions")

    # 3. Greedy completions of both, and where they diverge.
    tokenizer = AutoTokenizer.from_pretrained(given.first)
    same = []
    for prompt in given.prompt:
        written = [greedy(model, tokenizer, prompt, given.tokens) for model in models]
        same.append(common(*written))
        print(f"> {prompt}: the same for {same[-1]} tokens")
        for place, ids in zip(places, written, strict=True):
            print(f"  {place}: {tokenizer.decode(ids)!r}")
    return {"perplexities": perplexities, "agreement": share, "same": same}


@torch.no_grad()
def agreement(first: Any, second: Any, windows: torch.Tensor) -> float:
    """Share of the positions of `windows`, int64 [count, seqlen], at which both models rank the same token first."""
    equal = 0
    for ids in windows.split(1):
        one, other = (model(input_ids=ids, use_cache=False).logits.argmax(-1) for model in (first, second))
        equal += int((one == other).sum())
    return equal / windows.numel()


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> list[int]:
    """Token ids of the greedy completion of `prompt`."""
    asked = tokenizer(prompt, return_tensors="pt")
    ids, mask = asked["input_ids"], asked["attention_mask"]
    written = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return [int(token) for token in written[0, ids.shape[1] :]]


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="FIRST", help="directory of a dense or compressed model")
    parser.add_argument("second", metavar="SECOND", help="directory of another form of the same model")
    parser.add_argument("--text", required=True, metavar="TEXT", help="text file to measure on")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to complete with both models; may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a completion")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="windows that are measured")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except SwscError as error:
        raise SystemExit(f"error: {error}") from None
