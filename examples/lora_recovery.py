"""Recover quality after compression: a short LoRA fine-tune of a compressed model on a text file.

    python -m examples.lora_recovery COMPRESSED ADAPTER --train TRAINING.txt --text TEST.txt --teacher DENSE

The compressed model does not change. A LoRA adapter on its compressed layers learns to predict what the dense model
predicts (--teacher), or the text itself without a teacher. Perplexity is measured before and after with the protocol of
`swsc evaluate`. A training text that shares passages with the evaluation text is refused.
"""
# some functions of transformers and torch have no type annotations
# mypy: allow-untyped-calls

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
from pipeline.storage import paths
from pipeline.texts.contamination import require_uncontaminated
from pipeline.texts.texts import read_text
from pipeline.texts.windows import CalibrationText, Windows, calibration_windows, make_windows
from swsc_core import SwscLinear


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fine-tune, evaluate and save; return the perplexities before and after, and the minutes of training."""
    args = _arguments(argv)
    logging.disable_progress_bar()
    inputs = paths.user_paths([("COMPRESSED", args.model), ("--teacher", args.teacher)])
    for flag, directory in (("ADAPTER", args.adapter), ("--merged", args.merged or args.adapter)):
        paths.require_disjoint_paths(paths.UserPath.at(flag, directory), inputs)

    # 1. Two texts. Shared passages are refused, because a perplexity on training text would be too low.
    test, training = evaluation_text(args), training_text(args)
    require_uncontaminated(training.hashes, read_text(args.text), args.text)

    # 2. The compressed model, opened like any other, and its perplexity.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    before = perplexity(window_losses(model, test.ids), args.model)
    print(f"{args.model}: perplexity {before:.3f} on {len(test.ids)} windows of {args.seqlen} tokens of {args.text}")

    # 3. An adapter on its compressed layers. B is zero at first, so the model has not changed yet.
    adapted = add_adapter(model, args.rank, args.seed)

    # 4. The fine-tune: towards the dense model's predictions, or towards the text.
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval() if args.teacher else None
    order = torch.randperm(len(training.ids), generator=torch.Generator().manual_seed(args.seed))
    started = time.perf_counter()
    train(adapted, teacher, torch.from_numpy(training.ids)[order], args.batch, args.rate, args.autocast)
    minutes = (time.perf_counter() - started) / 60

    # 5. The perplexity now, and the adapter on disk: stock PEFT opens it on top of the compressed model.
    after = perplexity(window_losses(adapted.eval(), test.ids), args.model)
    adapted.save_pretrained(args.adapter)
    tokens = training.ids.size
    print(f"perplexity {before:.3f} -> {after:.3f} after {minutes:.1f} minutes on {tokens:,} tokens of {args.train}")
    print(f"{args.adapter}: the adapter; PeftModel.from_pretrained(compressed model, {args.adapter!r}) opens it")
    if args.merged:
        save_merged(adapted, args.model, args.merged)
    return {"before": before, "after": after, "minutes": minutes}


def evaluation_text(args: argparse.Namespace) -> Windows:
    """The windows that perplexity is measured on."""
    return make_windows(args.model, EvaluateSettings(text=args.text, seqlen=args.seqlen, windows=args.windows))


def training_text(args: argparse.Namespace) -> CalibrationText:
    """The windows of the training text: one pass over them is the whole fine-tune."""
    settings = CalibrationSettings(
        calibration=args.train,
        calibration_windows=args.steps * args.batch,
        calibration_seqlen=args.train_seqlen,
    )
    return calibration_windows(args.model, settings)


def add_adapter(model: Any, rank: int, seed: int) -> Any:
    """Put an adapter on every compressed linear layer except the head, and print its size."""
    torch.manual_seed(seed)
    layers = [path for path, layer in model.named_modules() if isinstance(layer, SwscLinear) and path != "lm_head"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    parameters = adapted.num_parameters(only_trainable=True)
    weights = sum(_weight_count(model, path) for path in layers)
    print(f"adapter of rank {rank} on {len(layers)} layers: {16 * parameters / weights:.3f} bits per weight")
    return adapted


def train(model: Any, teacher: Any, windows: torch.Tensor, batch: int, rate: float, autocast: bool) -> None:
    """One pass over the windows with AdamW; the learning rate warms up for a tenth of the steps, then decays to zero.

    Args:
        model: the model with its adapter.
        teacher: the dense model; None to learn the text itself.
        windows: token ids, int64 [count, seqlen].
        batch: windows per step.
        rate: largest learning rate.
        autocast: compute in bfloat16.
    """
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    steps = len(windows) // batch
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
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
    """Save model and adapter as one compressed model of higher rank, in the dtype of the original."""
    adapted.merge_and_unload().to(AutoConfig.from_pretrained(model).dtype).save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    print(f"{output}: model and adapter merged, still compressed")


def _loss(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """KL divergence to the teacher's prediction, or cross-entropy without a teacher, in nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    if teacher is None:
        return cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return kl_div(log_softmax(logits, -1), log_softmax(teacher_logits, -1), log_target=True, reduction="batchmean")


def _weight_count(model: Any, path: str) -> int:
    layer = model.get_submodule(path).get_base_layer()
    return int(layer.in_features * layer.out_features)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="COMPRESSED", help="output directory of `swsc compress`")
    parser.add_argument("adapter", metavar="ADAPTER", help="directory to write the adapter into")
    parser.add_argument("--train", required=True, metavar="TEXT", help="text file to train on")
    parser.add_argument("--text", required=True, metavar="TEXT", help="text file to evaluate on")
    parser.add_argument(
        "--teacher", metavar="DENSE", help="directory of the dense model (default: learn the text itself)"
    )
    parser.add_argument("--merged", metavar="OUTPUT", help="also save model and adapter as one compressed model")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="windows per step (default: %(default)s)")
    parser.add_argument(
        "--train-seqlen", type=int, default=256, help="tokens per training window (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16; fast on processors that support it")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per evaluation window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="number of evaluation windows (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the adapter's initial values and the order of the windows"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except SwscError as error:
        raise SystemExit(f"error: {error}") from None
