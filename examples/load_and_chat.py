"""Open a compressed model and chat with it.

    python -m examples.load_and_chat COMPRESSED --prompt "What is a codebook?"
    python -m examples.load_and_chat COMPRESSED --sample < questions.txt

Without --prompt each line of the standard input is one turn of a conversation, which keeps its history. If the tokenizer has a
chat template it is used; otherwise the model completes the text.
"""

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
    """Load the model, print what was loaded, answer each line; return the answers."""
    given = _arguments(argv)
    logging.disable_progress_bar()
    if not Path(given.model).is_dir():  # otherwise transformers would look for it on the Hub
        raise SystemExit(f"error: {given.model}: no such directory; give one that `swsc compress` has written")

    # 1. Load like any other model. Nothing is unpacked: layers compute from the stored parts.
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto", device_map=given.device).eval()
    compressed = sum(isinstance(layer, SwscLinear | SwscEmbedding) for layer in model.modules())
    held = sum(part.numel() * part.element_size() for part in model.parameters())
    print(f"{given.model}: {compressed} compressed layers, {held / 2**20:.1f} MiB held in {model.dtype}")

    # 2. Answer one line after the other.
    talks = tokenizer.chat_template is not None
    print("the tokenizer has a chat template" if talks else "no chat template: the model completes the text")
    torch.manual_seed(given.seed)
    turns: list[dict[str, str]] = []
    for line in given.prompt or (line.strip() for line in sys.stdin):
        turns.append({"role": "user", "content": line})
        answer = reply(model, tokenizer, turns if talks else line, given)
        turns.append({"role": "assistant", "content": answer})
        print(f"> {line}\n{answer}")
    return [turn["content"] for turn in turns[1::2]]


def reply(model: Any, tokenizer: Any, turns: str | list[dict[str, str]], given: argparse.Namespace) -> str:
    """The model's reply to a text, or to the turns of a conversation."""
    if isinstance(turns, str):
        asked = tokenizer(turns, return_tensors="pt")
    else:
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    kind = {"do_sample": True, "temperature": given.temperature} if given.sample else {"do_sample": False}
    ids = {name: asked[name].to(model.device) for name in ("input_ids", "attention_mask")}
    written = model.generate(**ids, max_new_tokens=given.tokens, pad_token_id=tokenizer.eos_token_id, **kind)
    return str(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="COMPRESSED", help="directory that `swsc compress` has written")
    parser.add_argument("--prompt", action="append", help="prompt; may be repeated (default: lines of stdin)")
    parser.add_argument("--tokens", type=int, default=64, help="maximum tokens of an answer")
    parser.add_argument("--sample", action="store_true", help="sample tokens (default: greedy decoding)")
    parser.add_argument("--temperature", type=float, default=0.7, help="temperature of sampling")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--device", default="cpu", help="device: cpu, cuda or auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
