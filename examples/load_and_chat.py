"""Open a compressed model and chat with it.

    python -m examples.load_and_chat COMPRESSED --prompt "What is a codebook?"
    python -m examples.load_and_chat COMPRESSED --sample < questions.txt

Without --prompt each line of the standard input is one turn of a conversation, which keeps its history. If the
tokenizer has a chat template it is used; otherwise the model completes the text.
"""
# some functions of transformers and torch have no type annotations
# mypy: allow-untyped-calls

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import swsc_core.hf  # noqa: F401  registers the format with transformers
from swsc_core import SwscEmbedding, SwscLinear


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Load the model, print a summary, answer each line; return the answers."""
    args = _arguments(argv)
    logging.disable_progress_bar()
    if not Path(args.model).is_dir():  # otherwise transformers would look for it on the Hub
        raise SystemExit(f"error: {args.model}: no such directory; use an output of `swsc compress`")

    # 1. Load like any other model. Nothing is unpacked: layers compute from the stored parts.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=args.device).eval()
    n_compressed = sum(isinstance(layer, SwscLinear | SwscEmbedding) for layer in model.modules())
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(f"{args.model}: {n_compressed} compressed layers, {n_bytes / 2**20:.1f} MiB of parameters in {model.dtype}")

    # 2. Answer one line after the other.
    is_chat = tokenizer.chat_template is not None
    print("the tokenizer has a chat template" if is_chat else "no chat template: the model completes the text")
    torch.manual_seed(args.seed)
    turns: list[dict[str, str]] = []
    for line in args.prompt or (line.strip() for line in sys.stdin):
        turns.append({"role": "user", "content": line})
        answer = reply(model, tokenizer, turns if is_chat else line, args)
        turns.append({"role": "assistant", "content": answer})
        print(f"> {line}\n{answer}")
    return [turn["content"] for turn in turns[1::2]]


def reply(model: Any, tokenizer: Any, turns: str | list[dict[str, str]], args: argparse.Namespace) -> str:
    """The model's reply to a text, or to the turns of a conversation."""
    if isinstance(turns, str):
        encoded = tokenizer(turns, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    sampling = {"do_sample": True, "temperature": args.temperature} if args.sample else {"do_sample": False}
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="COMPRESSED", help="output directory of `swsc compress`")
    parser.add_argument("--prompt", action="append", help="prompt; may be repeated (default: lines of stdin)")
    parser.add_argument("--tokens", type=int, default=64, help="maximum tokens per answer (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="sample tokens (default: greedy decoding)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="sampling temperature, with --sample (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device: cpu, cuda or auto (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
