"""A model that is evaluated in blocks of layers gives the losses of the whole model, to the last bit.

Blocks of one unit are the embedding, a layer or the head; those of two units a layer with embedding or head; those of
three units both layers with the embedding, and the head.
"""

import pytest

from pipeline.engine.worker import Worker
from tests.support.blocks import losses_in_blocks, losses_whole, model_key
from tests.support.families import FamilyModel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_model_in_blocks_equals_the_whole_one(family: FamilyModel, dtype: str) -> None:
    key = model_key(family.dense, dtype)
    whole = losses_whole(key)
    assert whole.dtype == dtype
    worker = Worker(1, "cpu")
    assert [losses_in_blocks(key, size, worker) for size in (1, 3)] == [whole, whole]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compressed_model_in_blocks_equals_the_whole_one(family: FamilyModel, dtype: str) -> None:
    key = model_key(family.compressed, dtype)
    whole = losses_whole(key)
    worker = Worker(1, "cpu")
    assert [losses_in_blocks(key, size, worker) for size in (2, 3)] == [whole, whole]
