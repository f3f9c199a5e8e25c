"""From headers and settings to a plan: an action and a reason for every tensor, and the tasks that carry it out.

Pure: nothing is read but what the checkpoint's headers said, nothing is written. What is predicted here (bytes, bits) is
counted by the same functions that count what is stored.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.foreign_quantization import require_unquantized
from pipeline.checkpoints.fp8_source import SCALE_REASON
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.redundant_tensors import find_ties
from pipeline.checkpoints.weight_files import tensor_files
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.matrices import FusedTensor, fused_tensors
from pipeline.planning.selection import Selected, select
from pipeline.planning.spec_resolution import Budget, budget_of, resolve, value_bits
from pipeline.settings.matrix import MatrixSettings
from swsc_core.compressed.config_json import part_name
from swsc_core.compressed.registry import part_names
from swsc_core.method.spec import Spec
from swsc_core.storage.location import MatrixLocation

_STORED = ("compressed", "copied")  # actions after which a tensor stands in the output
_COPY_BYTES = 2 << 30  # largest file of copied tensors: large single files are copied in parallel


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor of the source, and why.

    Attributes:
        specs: how it is compressed; of several the one of smaller error is kept. Empty unless compressed.
        stored_bytes: foretold bytes in the compact form (of several specs, the largest).
        paper_bits: bits a weight as the paper counts them; None unless compressed.
    """

    info: TensorInfo | MatrixInfo
    action: Literal["compressed", "copied", "split", "tied", "left out"]
    reason: str
    stored_bytes: int
    specs: tuple[Spec, ...] = ()
    paper_bits: float | None = None

    @property
    def matrix(self) -> MatrixInfo:
        """What is compressed; TypeError for a decision on a whole tensor."""
        if not isinstance(self.info, MatrixInfo):
            raise TypeError(f"{self.info.name} is {self.action}, a tensor that is not compressed")
        return self.info

    @property
    def location(self) -> MatrixLocation:
        """Where a matrix lies in its tensor; the default for a whole tensor."""
        return self.info.location if isinstance(self.info, MatrixInfo) else MatrixLocation()


@dataclass(frozen=True)
class LayerTask:
    """Compress the selected matrices of one layer into one file, and write the remaining rows of fused tensors."""

    layer: str
    file: str
    items: tuple[tuple[MatrixInfo, tuple[Spec, ...]], ...]
    fused: tuple[FusedTensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info, _ in self.items)


@dataclass(frozen=True)
class CopyTask:
    """Stream tensors that stay as they are into one file."""

    file: str
    infos: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)


@dataclass(frozen=True)
class Plan:
    """All decisions, in the source's order, and tasks, largest first within their kind."""

    decisions: tuple[Decision, ...]
    layers: tuple[LayerTask, ...]
    copies: tuple[CopyTask, ...]

    @property
    def compressed(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.action == "compressed"]

    @property
    def weights(self) -> int:
        return sum(decision.info.count for decision in self.decisions if decision.action in _STORED)

    @property
    def stored_bytes(self) -> int:
        """Foretold bytes of all tensors in the compact form."""
        return sum(decision.stored_bytes for decision in self.decisions)

    def stored_bytes_as(self, form: str) -> int:
        """Foretold bytes of all tensors in the given output format."""
        dense = sum(decision.info.nbytes for decision in self.decisions if decision.action in _STORED)
        return self.stored_bytes if form == "swsc" else dense


def make_plan(checkpoint: Checkpoint, settings: MatrixSettings, dense: bool = False) -> Plan:
    """Decide for every tensor.

    Args:
        dense: the output holds restored weights, as in `select`.

    Raises:
        ConfigError: an unknown projector, a projector or expression that selects nothing, or k, r or a budget that does
            not fit a selected matrix.
        CheckpointError: the source is quantized already.
    """
    require_unquantized(checkpoint.store.root, checkpoint.tensors, checkpoint.config)
    selected = select(checkpoint, settings, dense)
    matrices = [one.info for one in selected if one.chosen and isinstance(one.info, MatrixInfo)]
    budget = budget_of(checkpoint, matrices, settings)
    decisions = [_decide(one, settings, budget) for one in selected]
    if not any(decision.action == "compressed" for decision in decisions):
        raise ConfigError(
            f"{checkpoint.store.root}: no tensor is selected{_first_left(decisions)}; select others by --projectors or --include"
        )
    _require_free_names(checkpoint, decisions)
    decisions += [*_split(checkpoint, decisions), *_tied(checkpoint)]
    decisions += [Decision(info, "left out", "a buffer that a model makes anew", 0) for info in checkpoint.buffers]
    decisions += [Decision(info, "left out", SCALE_REASON, 0) for info in checkpoint.scales]
    return _with_tasks(decisions)


def _require_free_names(checkpoint: Checkpoint, decisions: Iterable[Decision]) -> None:
    """Raise CheckpointError if a tensor has a name that a part of a compressed one would be stored under."""
    for decision in decisions:
        name, tensor = decision.info.name, decision.location.tensor or decision.info.name
        needed = [part_name(name, part) for part in part_names() if part_name(name, part) != tensor]
        taken = [other for other in needed if other in checkpoint.tensors]
        if decision.action == "compressed" and taken:
            raise CheckpointError(
                f"{checkpoint.store.root}: {taken[0]} has a name that the compressed {name} needs; leave that out by --exclude"
            )


def _first_left(decisions: Iterable[Decision]) -> str:
    """The first tensor that the settings name and that is not compressed all the same, and why: of float64, say."""
    found = next((one for one in decisions if ", but " in one.reason), None)
    return f" ({found.info.name}: {found.reason})" if found else ""


def _decide(selected: Selected, settings: MatrixSettings, budget: Budget) -> Decision:
    info, reason = selected.info, selected.reason
    if not selected.chosen:
        return Decision(info, "copied", reason, info.nbytes)
    if not isinstance(info, MatrixInfo):
        what = f"{info.dtype} {list(info.shape)} is not a matrix of a dtype that is compressed"
        return Decision(info, "copied", f"{reason}, but {what}", info.nbytes)
    return _compressed(info, reason, resolve(info, settings, budget), settings)


def require_coverage(plan: Plan, share: float | None) -> None:
    """Raise ConfigError if a smaller share of the weights than `share` is compressed."""
    covered = sum(decision.info.count for decision in plan.compressed) / plan.weights
    if share is not None and covered < share:
        raise ConfigError(
            f"require_coverage {share:g}: {covered:.4f} of the weights are selected; select more by --projectors or --include"
        )


def with_specs(plan: Plan, specs: Mapping[str, tuple[Spec, ...]], settings: MatrixSettings) -> Plan:
    """`plan` with other specs for the matrices named."""
    decisions = []
    for decision in plan.decisions:
        own = specs.get(decision.info.name)
        decisions.append(decision if own is None else _compressed(decision.matrix, decision.reason, own, settings))
    return _with_tasks(decisions)


def _compressed(matrix: MatrixInfo, reason: str, specs: tuple[Spec, ...], settings: MatrixSettings) -> Decision:
    width = value_bits(matrix.dtype, settings)
    stored = max(spec.stored_bytes(matrix.shape, width) for spec in specs)
    return Decision(matrix, "compressed", reason, stored, specs, max(spec.paper_bits(matrix.shape) for spec in specs))


def _split(checkpoint: Checkpoint, decisions: Iterable[Decision]) -> Iterable[Decision]:
    """The tensors whose matrices are decided on one by one."""
    for fused in fused_tensors(one.info for one in decisions if isinstance(one.info, MatrixInfo)):
        yield Decision(checkpoint.tensors[fused.tensor.name], "split", "joins several matrices, see its pieces", 0)


def _tied(checkpoint: Checkpoint) -> Iterable[Decision]:
    """The output head that is the embedding, whether the files leave it out or hold it twice."""
    stored = checkpoint.tensors
    for tie in find_ties(stored, checkpoint.config, checkpoint.store.root):
        if tie.shares in stored and tie.name not in stored:
            how = "a stored copy, shares" if tie in checkpoint.copies else "shares"
            yield Decision(replace(stored[tie.shares], name=tie.name), "tied", f"{how} {tie.shares}", 0)


def _with_tasks(decisions: list[Decision]) -> Plan:
    layers: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        if decision.action == "compressed":
            # of parts of a tensor without a layer, too, that of the tensor
            layers[layer_of(decision.matrix.tensor.name)].append(decision)
    fused = {layer: fused_tensors(item.matrix for item in items) for layer, items in layers.items()}
    # a matrix that is copied is among the remaining rows of a fused tensor
    copied = [item.info for item in decisions if item.action == "copied" and isinstance(item.info, TensorInfo)]
    copies = list(_copy_groups(copied))
    files = iter(tensor_files(len(layers) + len(copies)))
    layer_tasks = [
        LayerTask(layer, next(files), tuple((item.matrix, item.specs) for item in items), fused[layer])
        for layer, items in layers.items()
    ]
    copy_tasks = [CopyTask(next(files), tuple(infos)) for infos in copies]

    def largest_first(task: LayerTask | CopyTask) -> int:
        return -task.nbytes

    return Plan(
        tuple(decisions), tuple(sorted(layer_tasks, key=largest_first)), tuple(sorted(copy_tasks, key=largest_first))
    )


def _copy_groups(infos: list[TensorInfo]) -> Iterable[list[TensorInfo]]:
    """Tensors of one source file, in its order, up to _COPY_BYTES a group."""
    group: list[TensorInfo] = []
    for info in infos:
        if group and (group[0].file != info.file or sum(i.nbytes for i in group) + info.nbytes > _COPY_BYTES):
            yield group
            group = []
        group.append(info)
    if group:
        yield group
