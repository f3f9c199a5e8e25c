"""A tiny Llama as a GGUF file, written by llama.cpp's own package."""

from pathlib import Path

import gguf
import numpy as np

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 64, 96, 2, 4, 128
Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def tensors() -> dict[str, np.ndarray]:
    """Weights of a tiny Llama under GGUF's names."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_{role}.weight": (HIDDEN, HIDDEN) for role in ("q", "k", "v", "output")}
        shapes |= {f"{block}.ffn_{role}.weight": (INNER, HIDDEN) for role in ("gate", "up")}
        shapes |= {f"{block}.ffn_down.weight": (HIDDEN, INNER)}
    weights = {name: (0.2 * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    norms = [f"blk.{layer}.{kind}_norm.weight" for layer in range(LAYERS) for kind in ("attn", "ffn")]
    return weights | {name: np.ones(HIDDEN, np.float32) for name in (*norms, "output_norm.weight")}


def make_tiny_gguf(path: Path, without: str = "", file_type: int | None = None, inner: int = INNER) -> Path:
    """Write a file with weights in Q8_0 and norms in F32.

    Args:
        path: path of the file.
        without: name of a tensor to leave out.
        file_type: general.file_type of the header.
        inner: intermediate size that the header states.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    letters, merged = [chr(0x21 + number) for number in range(90)], ['!"', "#$"]
    writer.add_token_list([*letters, *merged, *(f"<{number}>" for number in range(VOCABULARY - 92))])
    writer.add_token_merges([" ".join(pair) for pair in merged])
    writer.add_bos_token_id(100)
    writer.add_eos_token_id(101)
    writer.add_license("apache-2.0")
    if file_type is not None:
        writer.add_file_type(file_type)
    for name, values in tensors().items():
        if name == without:
            continue
        kind = F32 if "norm" in name else Q8
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
