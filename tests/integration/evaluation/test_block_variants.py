"""Blocks whose matrices are exchanged: losses equal those of the whole model with the same matrices."""

import numpy as np
import pytest
import torch

from pipeline.blocks.block import Block
from pipeline.blocks.runner import BlockKey
from pipeline.checkpoints.tensor_io import Payload, to_stored_tensor
from pipeline.evaluation.block_variants import VariantBlocks, matrices_of_blocks
from pipeline.evaluation.perplexity import Evaluator, batch_losses
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import open_model
from swsc_core import RtnSpec, encode
from tests.support.tiny import make_tiny_model

LAYERS = 3
BLOCKS = (Block(0, 2, LAYERS), Block(2, 3, LAYERS))
MATRIX = "model.layers.{}.{}.weight"
VARIANTS = {
    "q": [MATRIX.format(layer, "self_attn.q_proj") for layer in range(LAYERS)],
    "q and embedding": [MATRIX.format(0, "self_attn.q_proj"), "model.embed_tokens.weight"],
    "down": [MATRIX.format(layer, "mlp.down_proj") for layer in range(LAYERS)],
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def key(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelKey:
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "m", layers=LAYERS, tied=request.param)
    return ModelKey(str(path), "auto", 2)


def payload_of(key: ModelKey, name: str) -> Payload:
    encoded = encode(open_model(key.location).read_matrix(name), (RtnSpec(bits=3),), seed=0, name=name)
    parts = tuple(to_stored_tensor(part, tensor) for part, tensor in encoded.tensors.items())
    return Payload(parts, ({"entry": encoded.entry.to_json()},))


def test_any_order_of_variants_and_blocks_gives_the_losses_of_the_whole_model(key: ModelKey) -> None:
    windows = np.arange(64).reshape(2, 32) % 250
    ids = torch.from_numpy(windows)
    payloads = {name: {matrix: payload_of(key, matrix) for matrix in VARIANTS[name]} for name in VARIANTS}
    payloads[""] = {}
    evaluator, runner = Evaluator(key, "cpu"), VariantBlocks(BlockKey(key, 0), "cpu")
    source = open_model(key.location)
    for order in (["", "q", "q and embedding", "down", ""], ["down", "q and embedding", "", "q"]):
        hidden: dict[str, torch.Tensor] = {}
        for number, block in enumerate(BLOCKS):
            before = dict(hidden)
            for name in order:
                used = matrices_of_blocks(source, key, BLOCKS, list(payloads[name]))[number]
                with torch.inference_mode():
                    weights = {matrix: payloads[name][matrix] for matrix in used}
                    runner.load_variant(block, name if used else "", weights)
                    hidden[name] = runner.layered.run(block, ids, before.get(name))
        for name in order:
            evaluator.load_weights(name, payloads[name])
            assert batch_losses(hidden[name], ids) == evaluator.losses(windows)


def test_a_matrix_belongs_to_the_blocks_that_compute_with_it(key: ModelKey) -> None:
    source = open_model(key.location)
    names = [MATRIX.format(1, "mlp.up_proj"), MATRIX.format(2, "mlp.up_proj"), "model.embed_tokens.weight"]
    first, last = matrices_of_blocks(source, key, BLOCKS, names)
    tied = "lm_head.weight" not in source.names
    assert first == (names[0], names[2])
    assert last == ((names[1], names[2]) if tied else (names[1],))
    if not tied:
        assert matrices_of_blocks(source, key, BLOCKS, ["lm_head.weight"]) == [(), ("lm_head.weight",)]
