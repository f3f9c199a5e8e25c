"""Passes of a tuning in blocks."""

import pytest

from pipeline.blocks.block import Block, partition
from pipeline.blocks.layout import BlockLayout
from pipeline.engine.memory import WorkerMemory
from pipeline.tuning.blocks_flow import BlockTuning, teacher_files
from pipeline.tuning.blocks_job import BlockTuneKey, BlockValues
from pipeline.tuning.tuner import TuneKey

KEY = BlockTuneKey(TuneKey("original", "compressed", "float32"), 0)


def tuning(blocks: tuple[Block, ...], **names: list[str]) -> BlockTuning:
    """`names`: "unitN" -> its matrices."""
    by_unit = {int(unit.removeprefix("unit")): matrices for unit, matrices in names.items()}
    return BlockTuning(KEY, BlockLayout(blocks, 0, WorkerMemory()), by_unit, WorkerMemory())


@pytest.mark.parametrize(
    ("names", "passes"),
    [
        ({"unit0": ["embedding"], "unit3": ["c"]}, [0, 1, 2, 1, 0]),
        ({"unit2": ["b"]}, [0, 1, 2, 1]),
        ({"unit3": ["c"], "unit4": ["head"]}, [0, 1, 2]),
    ],
)
def test_the_backward_pass_ends_with_the_first_block_that_has_matrices(
    names: dict[str, list[str]], passes: list[int]
) -> None:
    layers = tuple(Block(layer, layer + 1, 3) for layer in range(3))
    assert [station.block.start for station in tuning(layers, **names).stations(backward=True)] == passes
    assert [station.block.start for station in tuning(layers, **names).stations(backward=False)] == [0, 1, 2]


def test_matrices_belong_to_the_block_of_their_unit() -> None:
    blocks = partition([2, 1, 1, 2], room=2)
    values = tuning(blocks, unit0=["e"], unit1=["a"], unit2=["b", "c"], unit3=["h"])
    assert [values.names_of(block) for block in blocks] == [("e",), ("a", "b", "c"), ("h",)]


def test_the_original_model_runs_up_to_its_last_layer() -> None:
    alone = tuning(partition([2, 1, 1, 2], room=2), unit1=["a"])
    assert alone.teacher_blocks == [Block(0, 0, 2, predicts=False), Block(0, 2, 2, embeds=False, predicts=False)]
    together = tuning((Block(0, 2, 2),), unit1=["a"])
    assert together.teacher_blocks == [Block(0, 2, 2, predicts=False)]


def test_values_need_a_state_after_the_first_step_where_there_are_matrices() -> None:
    block = Block(0, 1, 1)
    needs = [BlockValues(block, names, step).needs_state for names, step in ((("a",), 0), (("a",), 1), ((), 1))]
    assert needs == [False, True, False]


def test_there_is_one_file_of_hidden_states_for_each_window() -> None:
    assert teacher_files(2) == ["teacher-00000.safetensors", "teacher-00001.safetensors"]
