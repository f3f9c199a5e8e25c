"""The job of an evaluation in blocks: one block for some windows, up to the losses after the last one."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.blocks.block import Block
from pipeline.blocks.runner import BlockKey, hidden_payload, hidden_states
from pipeline.device import ordered_scans
from pipeline.engine.malloc import peak_rss
from pipeline.engine.task import JobContext, JobOutput
from pipeline.evaluation.block_variants import VariantBlocks
from pipeline.evaluation.perplexity import batch_losses


@dataclass(frozen=True)
class BlockResult:
    """What a pass of one block returns to the driver.

    Attributes:
        losses: mean cross-entropy of each window in nats per token, after the last block; else none.
        dtype: torch name of the dtype of the model.
        peak_rss: largest resident memory of the worker, in bytes.
        bytes_read: bytes of parameters that the worker has read since its last pass.
    """

    losses: tuple[float, ...]
    dtype: str
    peak_rss: int
    bytes_read: int


@dataclass(frozen=True)
class RunBlock:
    """Hidden states of some windows after one block, as the payload, or their losses after the last one.

    Inputs: in a sweep, compressed matrices that replace the block's weights, one for each of `names`; then the hidden
    states before the block, except for the first block.

    Attributes:
        windows: int64 [windows, seqlen].
        batch_size: windows of a batch.
        upcoming: block that the worker will probably run next; it is read meanwhile.
        variant: identifies the replacement; "" for the model without replacements.
        names: matrices of the block that are replaced.
    """

    key: BlockKey
    block: Block
    windows: np.ndarray
    batch_size: int
    upcoming: Block | None = None
    variant: str = ""
    names: tuple[str, ...] = ()

    def run(self, context: JobContext) -> JobOutput[BlockResult]:
        try:
            return self._run(context, context.model(VariantBlocks, self.key))
        except BaseException:
            context.models.clear()  # a block with only some weights replaced would falsify the next measurement
            raise

    def _run(self, context: JobContext, runner: VariantBlocks) -> JobOutput[BlockResult]:
        weights = dict(zip(self.names, context.inputs, strict=False))
        runner.load_variant(self.block, self.variant, weights, self.upcoming)
        batches = runner.batches(self.windows, self.batch_size)
        states: list[Tensor | None] = [None] * len(batches)
        if not self.block.is_first:
            states = list(hidden_states(context.inputs[-1], context.device))
        outputs, losses = [], []
        with torch.inference_mode(), ordered_scans(context.device):
            for ids, hidden in zip(batches, states, strict=True):
                output = runner.layered.run(self.block, ids, hidden)
                if self.block.is_last:
                    losses += batch_losses(output, ids)
                else:
                    outputs.append(output)
        result = BlockResult(tuple(losses), runner.dtype, peak_rss(), runner.new_bytes_read())
        return JobOutput(result, (hidden_payload(outputs),) if outputs else ())
