"""The job of a calibration in blocks: one pass of one block for the windows of a shard, forward or backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.blocks.block import Block
from pipeline.blocks.runner import BlockKey, BlockRunner, hidden_payload, hidden_states
from pipeline.calibration.gather import backward_from_prediction, require_finite, require_reached, sums_payload
from pipeline.calibration.hessian_hooks import HessianHooks, HessianSums
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import Payload
from pipeline.device import deterministic
from pipeline.engine.task import JobContext, JobOutput


@dataclass(frozen=True)
class PieceOfText:
    """Windows that travel together.

    Sums are added up window by window within a shard of the text, and then shard by shard, as without blocks.

    Attributes:
        windows: int64 [windows, seqlen].
        number: number of the piece.
        first: index of its first window in the text.
        ends_shard: its last window is the last one of a shard.
        is_last: no piece follows.
    """

    windows: np.ndarray
    number: int
    first: int
    ends_shard: bool
    is_last: bool


@dataclass(frozen=True)
class GatherResult:
    """What a pass of a block returns to the driver.

    Attributes:
        source_digests: digests of the byte ranges that the block was loaded from.
        sums_lost: the worker lacks the sums of the earlier pieces, so this pass was not made.
    """

    source_digests: RangeDigests
    sums_lost: bool = False


class BlockCalibrator(BlockRunner):
    """Runs blocks, and keeps the sums of the block at hand over the pieces that have passed it."""

    def __init__(self, key: BlockKey, device: str) -> None:
        self.source_digests: RangeDigests = {}
        super().__init__(key, device, self.source_digests)
        self._block: Block | None = None
        self._n_pieces = 0
        # Sums over the present shard, and over the earlier ones.
        self.sums: dict[str, HessianSums] = {}
        self._totals: dict[str, HessianSums] = {}

    def forward(self, block: Block, windows: np.ndarray, states: Sequence[Tensor | None]) -> list[Tensor]:
        """Hidden states of each window after a block."""
        with torch.no_grad(), deterministic(self.device):  # the kernels of the backward pass
            pairs = zip(self.batches(windows, 1), states, strict=True)
            return [self.layered.run(block, ids, hidden) for ids, hidden in pairs]

    def begin(self, block: Block, piece: PieceOfText) -> bool:
        """Prepare to add up a piece; False if the sums over the earlier pieces are not here."""
        if piece.number == 0:
            self._block, self._n_pieces, self.sums, self._totals = block, 0, {}, {}
        is_next = self._block == block and self._n_pieces == piece.number
        self._block = None  # the sums are incomplete until `finish`
        return is_next

    def new_digests(self) -> RangeDigests:
        """Digests of the byte ranges that were read since the last call."""
        digests = dict(self.source_digests)
        self.source_digests.clear()
        return digests

    def finish(self, block: Block, piece: PieceOfText) -> None:
        """Note that a piece has been added up."""
        self._block, self._n_pieces = block, piece.number + 1
        if piece.ends_shard:
            for name, sums in self.sums.items():
                if name in self._totals:
                    self._totals[name].add_sums(sums)
                else:
                    self._totals[name] = sums
            self.sums = {}

    def take_totals(self) -> dict[str, HessianSums]:
        """The sums over all pieces, which are released."""
        totals, self._totals, self._block = self._totals, {}, None
        return totals


@dataclass(frozen=True)
class ForwardBlock:
    """Hidden states of the windows of a piece after a block, as the payload.

    Input: their hidden states before the block; none for the first block.
    """

    key: BlockKey
    block: Block
    piece: PieceOfText
    upcoming: Block | None

    def run(self, context: JobContext) -> JobOutput[GatherResult]:
        calibrator = context.model(BlockCalibrator, self.key)
        calibrator.load(self.block, self.upcoming)
        states = _states_before(self.block, self.piece, context)
        outputs = calibrator.forward(self.block, self.piece.windows, states)
        return JobOutput(GatherResult(calibrator.new_digests()), (hidden_payload(outputs),))


@dataclass(frozen=True)
class BackwardBlock:
    """Repeat the forward pass of a block with gradients, and add up the Hessians of its matrices.

    Inputs: the hidden states before the block, except for the first block, and the gradients of the hidden states after
    it, except for the last block, which computes the loss. The first payload holds the gradients of the hidden states
    before the block; it is empty for the first block. After the last piece, one payload for each of `parts` follows.

    Attributes:
        parts: names of the matrices that are calibrated, by payload.
        seed: of the tokens that are drawn from the model's predictions.
        adds: add to the sums; False if only the gradients are needed again.
    """

    key: BlockKey
    block: Block
    parts: tuple[tuple[str, ...], ...]
    piece: PieceOfText
    seed: int
    adds: bool
    upcoming: Block | None

    @property
    def returns_sums(self) -> bool:
        """Whether payloads of sums follow the gradients."""
        return self.adds and self.piece.is_last

    def run(self, context: JobContext) -> JobOutput[GatherResult]:
        calibrator = context.model(BlockCalibrator, self.key)
        if self.adds and not calibrator.begin(self.block, self.piece):
            n_payloads = 1 + len(self.parts) * self.returns_sums
            return JobOutput(GatherResult({}, sums_lost=True), (Payload(()),) * n_payloads)
        calibrator.load(self.block, self.upcoming)
        gradients = self._gradients(calibrator, context)
        if self.adds:
            calibrator.finish(self.block, self.piece)
        totals = calibrator.take_totals() if self.returns_sums else {}
        payloads = [sums_payload({name: totals[name] for name in part}) for part in self.parts] if totals else []
        return JobOutput(GatherResult(calibrator.new_digests()), (hidden_payload(gradients), *payloads))

    def _gradients(self, calibrator: BlockCalibrator, context: JobContext) -> list[Tensor]:
        """Gradients of the hidden states before the block, of each window; none for the first block."""
        names = [name for part in self.parts for name in part] if self.adds else []
        sums = calibrator.sums
        hooks = HessianHooks(calibrator.skeleton.model, calibrator.skeleton.source, sums)
        for name in names:
            hooks.add(name)
        states = _states_before(self.block, self.piece, context)
        after = [None] * len(states) if self.block.is_last else hidden_states(context.inputs[-1], context.device)
        gradients = []
        with hooks, deterministic(context.device):
            batches = calibrator.batches(self.piece.windows, 1)
            for index, (ids, hidden, gradient) in enumerate(zip(batches, states, after, strict=True), self.piece.first):
                gradients.append(self._backward(calibrator, ids, hidden, gradient, index))
                hooks.forget_inputs()
                require_finite(sums, index)
        require_reached(names, sums, calibrator.skeleton.source.checkpoint.store.root)
        return [gradient for gradient in gradients if gradient is not None]

    def _backward(
        self, calibrator: BlockCalibrator, ids: Tensor, hidden: Tensor | None, gradient: Tensor | None, index: int
    ) -> Tensor | None:
        before = None if hidden is None else hidden.requires_grad_()
        output = calibrator.layered.run(self.block, ids, before)
        if self.block.is_last:
            backward_from_prediction(output[0], torch.Generator().manual_seed((self.seed << 32) + index))
        else:
            output.backward(gradient)
        return None if before is None else before.grad


def _states_before(block: Block, piece: PieceOfText, context: JobContext) -> list[Tensor | None]:
    if block.is_first:
        return [None] * len(piece.windows)
    return list(hidden_states(context.inputs[0], context.device))
