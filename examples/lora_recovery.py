"""Recover quality after compression: a short LoRA fine-tune of a compressed model on a text file.

    python -m examples.lora_recovery COMPRESSED ADAPTER --train TRAINING.txt --text TEST.txt --teacher DENSE

The compressed model does not change. A LoRA adapter on its compressed layers learns to predict what the dense model predicts
(--teacher), or the text itself without a teacher. Perplexity is measured before and after with the protocol of `swsc evaluate`.
A training text that shares passages with the evaluation text is refused.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import swsc_core.hf.lora  # noqa: F401  registers compressed layers with transformers and PEFT
from pipeline.errors import SwscError
from pipeline.evaluation.perplexity import perplexity, window_losses
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.storage import paths as places
from pipeline.texts.contamination import require_apart
from pipeline.texts.texts import read_text
from pipeline.texts.windows import calibration_windows, make_windows
from swsc_core import SwscLinear


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fine-tune, evaluate and save; return the perplexities before and after, and the minutes of training."""
    given = _arguments(argv)
    logging.disable_progress_bar()
    read = places.user_paths([("COMPRESSED", given.model), ("--teacher", given.teacher)])
    for what, folder in (("ADAPTER", given.adapter), ("--merged", given.merged or given.adapter)):
        places.require_disjoint_paths(places.UserPath.at(what, folder), read)

    # 1. Two texts. Shared passages are refused, because a perplexity on training text would be too low.
    test = make_windows(given.model, EvaluateSettings(text=given.text, seqlen=given.seqlen, windows=given.windows))
    training = calibration_windows(
        given.model,
        CalibrationSettings(
            calibration=given.train,
            calibration_windows=given.steps * given.batch,
            calibration_seqlen=given.train_seqlen,
        ),
    )
    require_apart(training.traces, read_text(given.text), given.text)

    # 2. The compressed model, opened like any other, and its perplexity.
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    before = perplexity(window_losses(model, test.ids), given.model)
    print(f"{given.model}: perplexity {before:.3f} on {len(test.ids)} windows of {given.seqlen} tokens of {given.text}")

    # 3. An adapter on its compressed layers. B is zero at first, so the model has not changed yet.
    torch.manual_seed(given.seed)
    layers = [path for path, layer in model.named_modules() if isinstance(layer, SwscLinear) and path != "lm_head"]
    adapted = get_peft_model(
        model, LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules=layers, task_type="CAUSAL_LM")
    )
    values, weights = adapted.num_parameters(only_trainable=True), sum(_weights(model, path) for path in layers)
    print(f"adapter of rank {given.rank} on {len(layers)} layers: {16 * values / weights:.3f} bits per weight")

    # 4. The fine-tune: towards the dense model's predictions, or towards the text.
    teacher = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=torch.float32).eval() if given.teacher else None
    order = torch.randperm(len(training.ids), generator=torch.Generator().manual_seed(given.seed))
    started = time.perf_counter()
    train(adapted, teacher, torch.from_numpy(training.ids)[order], given.batch, given.rate, given.autocast)
    minutes = (time.perf_counter() - started) / 60

    # 5. The perplexity now, and the adapter on disk: stock PEFT opens it on top of the compressed model.
    after = perplexity(window_losses(adapted.eval(), test.ids), given.model)
    adapted.save_pretrained(given.adapter)
    tokens = training.ids.size
    print(f"perplexity {before:.3f} -> {after:.3f} after {minutes:.1f} minutes on {tokens:,} tokens of {given.train}")
    print(f"{given.adapter}: the adapter; PeftModel.from_pretrained(compressed model, {given.adapter!r}) opens it")
    if given.merged:
        save_merged(adapted, given.model, given.merged)
    return {"before": before, "after": after, "minutes": minutes}


def train(model: Any, teacher: Any, windows: torch.Tensor, batch: int, rate: float, autocast: bool) -> None:
    """One pass over `windows`, int64 [count, seqlen], with AdamW; the rate warms up for a tenth of it and decays to zero."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    steps = len(windows) // batch
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    for step, ids in enumerate(windows.split(batch), start=1):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            loss = _loss(model, teacher, ids.to(model.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}", flush=True)


def save_merged(adapted: Any, model: str, output: str) -> None:
    """Save model and adapter as one compressed model of higher rank, in the dtype of the original; all verbs open it."""
    adapted.merge_and_unload().to(AutoConfig.from_pretrained(model).dtype).save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    print(f"{output}: model and adapter merged, still compressed")


def _loss(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """KL divergence to the teacher's prediction, or cross-entropy without a teacher, in nats per token."""
    predicted = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    if teacher is None:
        return cross_entropy(predicted, ids[:, 1:].flatten())
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return kl_div(log_softmax(predicted, -1), log_softmax(wanted, -1), log_target=True, reduction="batchmean")


def _weights(model: Any, path: str) -> int:
    layer = model.get_submodule(path).get_base_layer()
    return int(layer.in_features * layer.out_features)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="COMPRESSED", help="directory that `swsc compress` has written")
    parser.add_argument("adapter", metavar="ADAPTER", help="directory to write the adapter into")
    parser.add_argument("--train", required=True, metavar="TEXT", help="text file to train on")
    parser.add_argument("--text", required=True, metavar="TEXT", help="text file to measure on")
    parser.add_argument(
        "--teacher", metavar="DENSE", help="directory of the dense model (default: learn the text itself)"
    )
    parser.add_argument("--merged", metavar="OUTPUT", help="also write both as one compressed model")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=1, help="windows per step")
    parser.add_argument("--train-seqlen", type=int, default=256, help="tokens per training window")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16; fast on processors that support it")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per evaluation window")
    parser.add_argument("--windows", type=int, default=8, help="number of evaluation windows")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the adapter's initial values and of the order of the text"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except SwscError as error:
        raise SystemExit(f"error: {error}") from None
