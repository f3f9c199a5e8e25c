"""The recorded settings: for each one a source, flags of `swsc compress`, and the verbs that read the output."""

from dataclasses import dataclass

_TINY_TEXT = "--calibration sources/calibration.txt --calibration-windows 128 --calibration-seqlen 64"
_SEGMENTS = "--clusters 16 --segment-size 4 --codebooks 2 --scaled --centroid-bits 8 --rank 2 --factor-bits 8"
_COARSE = "--clusters 4 --rank 2 --n-init 1 --projectors"


@dataclass(frozen=True)
class Setting:
    """One `swsc compress`, and the verbs that follow it.

    Attributes:
        name: unique name of the setting.
        model: source, relative to the folder in which the commands run.
        flags: further flags of `swsc compress`.
        then: verbs that follow, of plan, restore, adapter, evaluate, open.
    """

    name: str
    model: str
    flags: str
    then: tuple[str, ...] = ()


def tiny_settings() -> tuple[Setting, ...]:
    """Settings on generated models with a few thousand weights."""
    tiny, whole = "sources/tiny", ("plan", "restore", "evaluate", "open")
    return (
        Setting("paper-output", tiny, "--bits 3", (*whole, "adapter")),
        Setting("paper-input", tiny, "--bits 3 --channel-axis input --projectors q,k,v", whole),
        Setting("paper-auto", tiny, "--clusters 8 --rank 4 --channel-axis auto --seed 3", ("plan",)),
        Setting("paper-activations", tiny, f"--clusters 8 --rank 4 --metric activations {_TINY_TEXT}", ("restore",)),
        Setting("rtn-tensor", tiny, "--method rtn --bits 4 --granularity tensor --symmetric", ("plan", "restore")),
        Setting("rtn-channel", tiny, "--method rtn --bits 3", whole),
        Setting("rtn-group", tiny, "--method rtn --bits 2 --granularity group --group-size 24", ("restore", "open")),
        Setting("segments", tiny, f"{_SEGMENTS} --projectors q,k,v,o,gate,up,down", whole),
        Setting("feedback", tiny, f"{_SEGMENTS} --metric activations --feedback {_TINY_TEXT}", ("restore",)),
        Setting("fast", tiny, f"--preset fast --bits 2.5 {_TINY_TEXT}", whole),
        Setting("best", tiny, f"--preset best --bits 3 --projectors q,k,v,down {_TINY_TEXT}", whole),
        Setting(
            "best-model",
            tiny,
            f"--preset best --bits 12 --bits-over model --tune 0 --projectors q,k,v,o,up {_TINY_TEXT}",
            ("restore",),
        ),
        Setting("data-free", tiny, "--preset data-free --bits 3 --calibration-windows 8 --calibration-seqlen 32"),
        Setting("tuned", tiny, f"{_SEGMENTS} --tune 3 --projectors q,k,v,o,gate,up,down {_TINY_TEXT}", whole),
        Setting("dense", tiny, "--bits 3 --format dense", ("evaluate",)),
        Setting("dense-best", tiny, f"--preset best --bits 3 --format dense {_TINY_TEXT}"),
        Setting("fused-qkv", "sources/phi3", f"{_COARSE} q,k,v,o,gate,up,down", whole),
        Setting("fused-qkv-best", "sources/phi3", f"--preset best --bits 3 {_TINY_TEXT}", ("restore",)),
        Setting("interleaved-qkv", "sources/falcon", f"{_COARSE} q,k,v,o,up,down", ("plan", "restore", "open")),
        Setting("transposed", "sources/gpt2", f"{_COARSE} q,k,v,o,up,down", ("plan", "restore", "open")),
        Setting("stacked-transposed", "sources/llama4", f"{_COARSE} q,k,v,o,gate,up,down,experts", whole),
        Setting("stacked-interleaved", "sources/gpt_oss", f"{_COARSE} q,k,v,o,experts", whole),
        Setting(
            "stacked-best", "sources/gpt_oss", f"--preset best --bits 4 --tune 0 --projectors experts {_TINY_TEXT}"
        ),
        Setting("experts", "sources/mixtral", f"{_COARSE} q,k,v,o,experts", ("plan", "restore", "open")),
        Setting("fp8", "sources/fp8", "--clusters 8 --rank 2", whole),
        Setting("gguf", "sources/tiny.gguf", "--bits 3", ("restore",)),
    )


def model_settings(model: str, calibration: str, text: str) -> tuple[Setting, ...]:
    """Settings on a real model, with few matrices each."""
    few = r"--include layers\.(3|21)\.self_attn\.[qk]_proj"
    tokens = f"--calibration {calibration} --calibration-windows 4 --calibration-seqlen 128"
    return (
        Setting("model-paper", model, f"--bits 3 {few}", ("evaluate",)),
        Setting("model-paper-input", model, f"--bits 2 --channel-axis input {few}"),
        Setting("model-rtn", model, f"--method rtn --bits 3 --granularity group {few}", ("restore",)),
        Setting("model-segments", model, f"{_SEGMENTS.replace('16', '256')} {few}"),
        Setting("model-best", model, rf"--preset best --bits 2.5 {tokens} --include layers\.21\.self_attn\.[kv]_proj"),
    )
