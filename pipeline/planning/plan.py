"""The plan of a compression: an action and a reason for every tensor, and the tasks that carry it out.

Planning is pure: it needs only the checkpoint's headers and the settings, and writes nothing. Predicted bytes and bits
are computed by the functions that also count what is stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.foreign_quantization import require_unquantized
from pipeline.checkpoints.fp8_source import SCALE_REASON
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.redundant_tensors import find_ties
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.matrices import fused_tensors
from pipeline.planning.selection import Selected, select
from pipeline.planning.spec_resolution import Budget, budget_of, resolve, value_bits
from pipeline.planning.tasks import CopyTask, LayerTask, make_tasks
from pipeline.settings.matrix import MatrixSettings
from swsc_core.compressed.config_json import part_name
from swsc_core.compressed.registry import part_names
from swsc_core.method.spec import Spec
from swsc_core.storage.location import MatrixLocation

# Actions after which a tensor is stored in the output.
_STORED = ("compressed", "copied")


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor of the source, and why.

    Attributes:
        info: the tensor, or a matrix of it.
        action: what happens to it.
        reason: why, for reports.
        stored_bytes: predicted bytes in the compressed format; the largest prediction if there are several specs.
        specs: candidates for the compression, of which the one with the smallest error is kept. Empty unless
            compressed.
        paper_bits: bits per weight as the paper counts them; None unless compressed.
    """

    info: TensorInfo | MatrixInfo
    action: Literal["compressed", "copied", "split", "tied", "left out"]
    reason: str
    stored_bytes: int
    specs: tuple[Spec, ...] = ()
    paper_bits: float | None = None

    @property
    def matrix(self) -> MatrixInfo:
        """The matrix that is compressed. Raises TypeError if the decision is about a whole tensor."""
        if not isinstance(self.info, MatrixInfo):
            raise TypeError(f"{self.info.name} is {self.action}, so it is not a matrix that is compressed")
        return self.info

    @property
    def location(self) -> MatrixLocation:
        """Location of a matrix in its tensor; the default location for a whole tensor."""
        return self.info.location if isinstance(self.info, MatrixInfo) else MatrixLocation()


@dataclass(frozen=True)
class Plan:
    """All decisions, in the source's order, and all tasks, largest first within their kind.

    Attributes:
        dense: the output holds restored weights.
    """

    decisions: tuple[Decision, ...]
    layers: tuple[LayerTask, ...]
    copies: tuple[CopyTask, ...]
    dense: bool = False

    @property
    def compressed(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.action == "compressed"]

    @property
    def matrices_by_file(self) -> dict[str, frozenset[str]]:
        """File of the output -> names of the matrices that are compressed into it; none for copied tensors."""
        copies: dict[str, frozenset[str]] = {copy.file: frozenset() for copy in self.copies}
        return copies | {layer.file: frozenset(info.name for info, _ in layer.items) for layer in self.layers}

    @property
    def largest_file_bytes(self) -> int:
        """Predicted bytes of the largest file of a layer."""
        stored = {decision.info.name: decision.stored_bytes for decision in self.compressed}
        return max(
            layer.nbytes if self.dense else sum(stored[info.name] for info, _ in layer.items) for layer in self.layers
        )

    @property
    def weights(self) -> int:
        return sum(decision.info.count for decision in self.decisions if decision.action in _STORED)

    @property
    def stored_bytes(self) -> int:
        """Predicted bytes of all tensors in the compressed format."""
        return sum(decision.stored_bytes for decision in self.decisions)

    def stored_bytes_as(self, form: str) -> int:
        """Return the predicted bytes of all tensors in the output format `form`, "swsc" or "dense"."""
        dense = sum(decision.info.nbytes for decision in self.decisions if decision.action in _STORED)
        return self.stored_bytes if form == "swsc" else dense


def make_plan(checkpoint: Checkpoint, settings: MatrixSettings, dense: bool = False) -> Plan:
    """Decide on every tensor.

    Args:
        checkpoint: the source.
        settings: which matrices are compressed and how.
        dense: the output holds restored weights, as in `select`.

    Raises:
        ConfigError: a projector is unknown, a projector or expression selects nothing, or k, r or a budget does not fit
            a selected matrix.
        CheckpointError: the source is already quantized.
    """
    require_unquantized(checkpoint.store.root, checkpoint.tensors, checkpoint.config)
    selected = select(checkpoint, settings, dense)
    matrices = [choice.info for choice in selected if choice.chosen and isinstance(choice.info, MatrixInfo)]
    budget = budget_of(checkpoint, matrices, settings)
    decisions = [_decide(choice, settings, budget) for choice in selected]
    if not any(decision.action == "compressed" for decision in decisions):
        rejected = _first_rejected(decisions)
        raise ConfigError(
            f"{checkpoint.store.root}: no tensor is selected{rejected}; select others by --projectors or --include"
        )
    _require_free_names(checkpoint, decisions)
    decisions += [*_split(checkpoint, decisions), *_tied(checkpoint)]
    decisions += [
        Decision(info, "left out", "a buffer that the model computes itself", 0) for info in checkpoint.buffers
    ]
    decisions += [Decision(info, "left out", SCALE_REASON, 0) for info in checkpoint.scales]
    return _with_tasks(decisions, dense)


def _require_free_names(checkpoint: Checkpoint, decisions: Iterable[Decision]) -> None:
    """Raise CheckpointError if a tensor has a name that a part of a compressed matrix needs."""
    for decision in decisions:
        name, tensor = decision.info.name, decision.location.tensor or decision.info.name
        needed = [part_name(name, part) for part in part_names() if part_name(name, part) != tensor]
        taken = [part for part in needed if part in checkpoint.tensors]
        if decision.action == "compressed" and taken:
            raise CheckpointError(
                f"{checkpoint.store.root}: the name of {taken[0]} is needed for a part of the compressed {name}; leave"
                f" {name} out by --exclude"
            )


def _first_rejected(decisions: Iterable[Decision]) -> str:
    """The first tensor that the settings name but that cannot be compressed, with the reason; "" if there is none."""
    rejected = next((decision for decision in decisions if ", but " in decision.reason), None)
    return f" ({rejected.info.name}: {rejected.reason})" if rejected else ""


def _decide(selected: Selected, settings: MatrixSettings, budget: Budget) -> Decision:
    info, reason = selected.info, selected.reason
    if not selected.chosen:
        return Decision(info, "copied", reason, info.nbytes)
    if not isinstance(info, MatrixInfo):
        obstacle = f"{info.dtype} {list(info.shape)} is not a matrix of a dtype that is compressed"
        return Decision(info, "copied", f"{reason}, but {obstacle}", info.nbytes)
    return _compressed(info, reason, resolve(info, settings, budget), settings)


def require_coverage(plan: Plan, share: float | None) -> None:
    """Raise ConfigError if less than `share` of the weights is compressed. None accepts any share."""
    covered = sum(decision.info.count for decision in plan.compressed) / plan.weights
    if share is not None and covered < share:
        raise ConfigError(
            f"require_coverage {share:g}: {covered:.4f} of the weights are selected; select more by --projectors or"
            " --include"
        )


def with_specs(plan: Plan, specs: Mapping[str, tuple[Spec, ...]], settings: MatrixSettings) -> Plan:
    """Return the plan with other specs for the matrices that `specs` names."""
    decisions = []
    for decision in plan.decisions:
        chosen = specs.get(decision.info.name)
        if chosen is not None:
            decision = _compressed(decision.matrix, decision.reason, chosen, settings)
        decisions.append(decision)
    return _with_tasks(decisions, plan.dense)


def _compressed(matrix: MatrixInfo, reason: str, specs: tuple[Spec, ...], settings: MatrixSettings) -> Decision:
    width = value_bits(matrix.dtype, settings)
    stored = max(spec.stored_bytes(matrix.shape, width) for spec in specs)
    return Decision(matrix, "compressed", reason, stored, specs, max(spec.paper_bits(matrix.shape) for spec in specs))


def _split(checkpoint: Checkpoint, decisions: Iterable[Decision]) -> Iterable[Decision]:
    """Decisions on fused tensors, whose matrices have decisions of their own."""
    matrices = (decision.info for decision in decisions if isinstance(decision.info, MatrixInfo))
    for fused in fused_tensors(matrices):
        yield Decision(checkpoint.tensors[fused.tensor.name], "split", "fuses several matrices, see its parts", 0)


def _tied(checkpoint: Checkpoint) -> Iterable[Decision]:
    """Decisions on output heads that share the embedding's weights, whether or not the files store a copy."""
    stored = checkpoint.tensors
    for tie in find_ties(stored, checkpoint.config, checkpoint.store.root):
        if tie.shares in stored and tie.name not in stored:
            relation = "a stored copy, shares" if tie in checkpoint.copies else "shares"
            yield Decision(replace(stored[tie.shares], name=tie.name), "tied", f"{relation} {tie.shares}", 0)


def _with_tasks(decisions: list[Decision], dense: bool) -> Plan:
    matrices = [(decision.matrix, decision.specs) for decision in decisions if decision.action == "compressed"]
    # A matrix that is copied is stored with the remaining rows of its fused tensor.
    copied = [item.info for item in decisions if item.action == "copied" and isinstance(item.info, TensorInfo)]
    return Plan(tuple(decisions), *make_tasks(matrices, copied, dense), dense)
