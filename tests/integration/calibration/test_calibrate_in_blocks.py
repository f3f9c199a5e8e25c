"""Calibration in blocks of layers: the files are those of workers that hold the whole model, to the byte."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.blocks.block import partition
from pipeline.blocks.layout import BlockLayout
from pipeline.blocks.twin import require_blocks
from pipeline.calibration import blocks_flow
from pipeline.calibration.blocks_flow import BlockCalibration, BlockGathering
from pipeline.calibration.flow import Calibration, CalibrationInputs, calibration_blocks, calibration_key
from pipeline.calibration.gathering import WindowShards
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.source import open_checkpoint
from pipeline.engine.memory import Room, WorkerMemory
from pipeline.engine.ray_backend.worker_pools import worker_pools
from pipeline.models.loading import meta_model
from pipeline.models.stored_model import Model
from pipeline.outputs.transaction import OutputRequest, begin
from pipeline.planning.plan import make_plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings
from pipeline.storage.store import Store
from tests.support.families import FamilyModel

# renamed tensors, tied embeddings, fused queries, keys and values, fused experts, and experts in one tensor
FAMILIES = ("gpt2", "llama 3", "phi3", "mixtral", "gpt_oss")
SETTINGS = CalibrationSettings(calibration="text", calibration_dtype="float32")
# Five windows in shards of three, which pass in pieces of one: the last shard is shorter.
IDS, SHARD = np.random.default_rng(0).integers(1, 250, (5, 24)), 3


def matrices_of(source: Checkpoint, family: FamilyModel) -> list[MatrixInfo]:
    plan = make_plan(source, CompressSettings(projectors=family.roles.split(","), clusters=4, rank=2))
    return [decision.matrix for decision in plan.compressed]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


def calibrated_in_blocks(source: Checkpoint, matrices: list[MatrixInfo], folder: Path, size: int) -> dict[str, bytes]:
    """Files of a calibration in blocks of `size` units."""
    key, enough = calibration_key(source, SETTINGS), Room("cpu", 1 << 50)
    parts = calibration_blocks(Model(source, {}), key, matrices, enough, (IDS.shape[1], 2)).parts
    model = meta_model(key)
    n_layers = model.config.get_text_config().num_hidden_layers
    blocks = partition([1] * (n_layers + 2), size)
    length = require_blocks(type(model), model.config, blocks, key.location)
    layout = BlockLayout(blocks, length, WorkerMemory())
    calibration = BlockCalibration(key, layout, parts, WindowShards(IDS, SHARD, 7), WorkerMemory())
    request = OutputRequest(Store.at(str(folder)), {"test": size})
    with worker_pools(ClusterSettings(local=True)) as pools, begin(request) as output:
        BlockGathering(calibration, output).run(pools)
    return files(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_sums_equal_those_of_the_whole_model(
    name: str, families: dict[str, FamilyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_flow, "PIECE_TOKENS", IDS.shape[1])
    monkeypatch.setattr("pipeline.calibration.flow._SHARD_TOKENS", SHARD * IDS.shape[1])
    source = open_checkpoint(str(families[name].dense))
    matrices = matrices_of(source, families[name])
    with worker_pools(ClusterSettings(local=True)) as pools:
        Calibration(CalibrationInputs(source, matrices, IDS, 7), SETTINGS, str(tmp_path / "whole")).run(pools)
    whole = files(tmp_path / "whole")
    assert whole
    for size in (1, 2):
        assert calibrated_in_blocks(source, matrices, tmp_path / str(size), size) == whole
