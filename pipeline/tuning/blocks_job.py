"""Jobs of a tuning in blocks: passes of one window through one block of the original or of the compressed model.

The original model runs once: its hidden states after the last layer are stored, and its head is applied to them where
its predictions are needed. That gives the logits of the whole model, because it is the same computation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.blocks.block import Block
from pipeline.blocks.runner import BlockKey, BlockRunner, hidden_payload, hidden_states
from pipeline.checkpoints.checkpoint import read_header
from pipeline.checkpoints.tensor_io import Payload, read_tensor
from pipeline.device import deterministic
from pipeline.engine.task import JobContext, JobOutput
from pipeline.models.loading import ModelKey
from pipeline.models.parameter_lookup import ParameterView, find_matrix_parameter
from pipeline.storage.store import Store
from pipeline.tuning.divergence import backward_from_divergence, divergence
from pipeline.tuning.job import Divergence
from pipeline.tuning.matrices import TunedMatrices, load_tunable
from pipeline.tuning.state import values_from_payload, values_to_payload
from pipeline.tuning.tuner import TuneKey

# Stands for the parameter of a view while no parameter is loaded.
_RELEASED = nn.Parameter(torch.empty(0), requires_grad=False)


@dataclass(frozen=True)
class BlockTuneKey:
    """What a `BlockTuner` is loaded from and as.

    Attributes:
        models: the two models.
        tuple_length: length of the tuple that their layers return, see `LayeredModel`.
    """

    models: TuneKey
    tuple_length: int

    @property
    def teacher(self) -> BlockKey:
        """Key of the original model."""
        key = self.models
        return BlockKey(ModelKey(key.original, key.dtype, 1, key.trusted, key.known), self.tuple_length)

    @property
    def student(self) -> BlockKey:
        """Key of the compressed model."""
        key = self.models
        return BlockKey(ModelKey(key.compressed, key.dtype, 1, key.trusted), self.tuple_length)


@dataclass(frozen=True)
class BlockValues:
    """A block of the compressed model with the values after some steps.

    Attributes:
        block: the block.
        names: its compressed matrices.
        step: number of steps.
    """

    block: Block
    names: tuple[str, ...]
    step: int

    @property
    def needs_state(self) -> bool:
        """Whether the values differ from those of the compressed model."""
        return self.step > 0 and bool(self.names)


@dataclass(frozen=True)
class WindowOfTuning:
    """A window of tokens, and where the hidden states of the original model after its last layer are.

    Attributes:
        ids: int64 [1, seqlen].
        store: directory with `file`.
        file: the hidden states [1, seqlen, width].
    """

    ids: np.ndarray
    store: Store
    file: str


class BlockTuner(BlockRunner):
    """Runs blocks of the compressed model, whose stored values can be replaced, and the head of the original one."""

    def __init__(self, key: BlockTuneKey, device: str) -> None:
        super().__init__(key.student, device)
        self.key = key
        self._teacher = BlockRunner(key.teacher, device)
        self._matrices: TunedMatrices | None = None
        self._held: BlockValues | None = None
        # Matrix -> name of its parameter, and its place there.
        self._places: dict[str, tuple[str, ParameterView]] = {}

    @property
    def matrices(self) -> TunedMatrices:
        """The compressed matrices of the block that is loaded."""
        assert self._matrices is not None
        return self._matrices

    def load_values(self, target: BlockValues, state: Sequence[Payload], upcoming: Block | None) -> None:
        """Load a block with values, which `state` holds if `target` needs one; begin to read the upcoming block."""
        held, self._held = self._held, None  # nothing is held until all values are loaded
        if held is None or held.block != target.block or (held.needs_state and not target.needs_state):
            self._matrices = None
            self.layered.release()
            self._teacher.layered.release()
        self.load(target.block, upcoming)
        if self._matrices is None:
            self._matrices = self._find(target.names)
        if target.needs_state and target != held:
            self._matrices.put(values_from_payload(state[0], "values", self.device))
        self._held = target

    def teacher_logits(self, block: Block, window: WindowOfTuning) -> Tensor:
        """Logits [seqlen, vocabulary] of the original model."""
        (info,) = read_header(window.store, window.file)[1]
        hidden = read_tensor(window.store, info).to(self.device)
        with torch.no_grad():
            return self._teacher.layered.run(block.head, self.ids(window), hidden)[0]

    def ids(self, window: WindowOfTuning) -> Tensor:
        """Tokens of a window on the device, int64 [1, seqlen]."""
        return self.batches(window.ids, 1)[0]

    def _find(self, names: Sequence[str]) -> TunedMatrices:
        model, source = self.skeleton.model, self.skeleton.source
        paths = {parameter: path for path, parameter in model.named_parameters()}
        for name in names:
            if name not in self._places:
                view = find_matrix_parameter(model, source, name)
                self._places[name] = paths[view.parameter], replace(view, parameter=_RELEASED)
        places = ((name, *self._places[name]) for name in names)
        views = {name: replace(view, parameter=model.get_parameter(path)) for name, path, view in places}
        return TunedMatrices({name: load_tunable(source, name, self.device) for name in names}, views)


@dataclass(frozen=True)
class TeacherForward:
    """Hidden states of a window after a block of the original model, as the payload.

    Input: the hidden states before the block; none for the first block.

    Attributes:
        ids: the window, int64 [1, seqlen].
        upcoming: block that the worker will probably run next.
    """

    key: BlockKey
    block: Block
    ids: np.ndarray
    upcoming: Block | None

    def run(self, context: JobContext) -> JobOutput[None]:
        runner = context.model(BlockRunner, self.key)
        runner.load(self.block, self.upcoming)
        hidden = hidden_states(context.inputs[0], context.device)[0] if context.inputs else None
        with torch.no_grad(), deterministic(context.device):
            output = runner.layered.run(self.block, runner.batches(self.ids, 1)[0], hidden)
        return JobOutput(None, (hidden_payload([output]),))


@dataclass(frozen=True)
class _StudentJob:
    """A pass of a window through a block of the compressed model.

    Inputs: the state of the block, if its values need one; the hidden states before the block, except for the first.

    Attributes:
        upcoming: block that the worker will probably run next.
    """

    key: BlockTuneKey
    values: BlockValues
    window: WindowOfTuning
    upcoming: Block | None

    def _load(self, context: JobContext) -> tuple[BlockTuner, list[Tensor]]:
        """The tuner with the block, and the inputs after the state."""
        tuner, count = context.model(BlockTuner, self.key), int(self.values.needs_state)
        tuner.load_values(self.values, context.inputs[:count], self.upcoming)
        return tuner, [hidden_states(payload, context.device)[0] for payload in context.inputs[count:]]

    def _forward(self, tuner: BlockTuner, hidden: Tensor | None) -> Tensor:
        return tuner.layered.run(self.values.block, tuner.ids(self.window), hidden)


@dataclass(frozen=True)
class StudentForward(_StudentJob):
    """Hidden states after a block, as the payload."""

    def run(self, context: JobContext) -> JobOutput[None]:
        tuner, inputs = self._load(context)
        with torch.no_grad(), deterministic(context.device):
            output = self._forward(tuner, inputs[0] if inputs else None)
        return JobOutput(None, (hidden_payload([output]),))


@dataclass(frozen=True)
class StudentDivergence(_StudentJob):
    """Divergence after the last block."""

    def run(self, context: JobContext) -> JobOutput[Divergence]:
        tuner, inputs = self._load(context)
        with torch.no_grad(), deterministic(context.device):
            teacher = tuner.teacher_logits(self.values.block, self.window)
            student = self._forward(tuner, inputs[0] if inputs else None)[0]
            total = divergence(teacher, student, self.key.models.compressed)
        return JobOutput(Divergence(total, self.window.ids.size))


@dataclass(frozen=True)
class StudentBackward(_StudentJob):
    """Repeat the forward pass of a block with gradients, and return the divergence after the last block.

    A further input, except for the last block: the gradient of the hidden states after the block. The payloads are the
    gradient of those before it, which is empty for the first block with compressed matrices, and the gradients of the
    stored values of the block.

    Attributes:
        is_end: the backward pass ends with this block.
    """

    is_end: bool

    def run(self, context: JobContext) -> JobOutput[Divergence | None]:
        tuner, inputs = self._load(context)
        block, value = self.values.block, None
        hidden = None if block.is_first else inputs[0].requires_grad_(not self.is_end)
        with tuner.matrices.projected_gradients() as sums, deterministic(context.device):
            if block.is_last:
                teacher = tuner.teacher_logits(block, self.window)
                total = backward_from_divergence(teacher, self._forward(tuner, hidden)[0], self.key.models.compressed)
                value = Divergence(total, self.window.ids.size)
            elif (output := self._forward(tuner, hidden)).requires_grad:  # unless the window reaches no matrix
                output.backward(inputs[-1])
        before = [] if hidden is None or hidden.grad is None else [hidden.grad]
        gradients = values_to_payload(tuner.matrices.completed(sums), "gradients")
        return JobOutput(value, (hidden_payload(before), gradients))
