"""Selection of the matrices to compress: by roles of the model family or by a regular expression, minus exclusions.

Nothing is guessed: a model that is missing in the table of families requires an expression, and a role or an expression
that selects nothing is an error.
"""

import re
from dataclasses import dataclass

from pipeline.architectures.families import Family, require_known_roles
from pipeline.architectures.stacked_experts import is_stack
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import tensor_kind
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.loading_refusals import LoadingRefusal, loading_refusal
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.errors import ConfigError
from pipeline.models.matrices import is_matrix, matrices_of
from pipeline.settings.matrix import MatrixSettings

# Kinds of tensors that a message lists.
_SHOWN = 12
_NOT_SELECTED = "not selected"


@dataclass(frozen=True)
class Selected:
    """A matrix, or a whole tensor; whether it will be compressed, and the reason."""

    info: TensorInfo | MatrixInfo
    chosen: bool
    reason: str


def select(checkpoint: Checkpoint, settings: MatrixSettings, dense: bool = False) -> list[Selected]:
    """Select matrices of a checkpoint.

    Args:
        checkpoint: the source.
        settings: roles, included and excluded names.
        dense: the output holds restored weights, which transformers loads like the source.

    Returns:
        An entry for every tensor, in the checkpoint's order. A tensor with several matrices has an entry for each of
        them if any of them is chosen.

    Raises:
        ConfigError: a role is unknown, the family has no roles, or a role or an expression selects nothing.
        CheckpointError: the shape of a fused tensor does not fit the config.
    """
    selector = _Selector(checkpoint, settings, dense)
    selected = [entry for info in checkpoint.tensors.values() for entry in selector.select(info)]
    for criterion in selector.unmatched:
        choices = _choices(checkpoint, selector.family)
        raise ConfigError(f"{checkpoint.store.root}: {criterion} selects no tensor; {choices}")
    return selected


class _Selector:
    """Applies the settings to one tensor after another.

    `unmatched` lists the criteria that no tensor has matched yet.
    """

    def __init__(self, checkpoint: Checkpoint, settings: MatrixSettings, dense: bool) -> None:
        self._checkpoint, self._exclude = checkpoint, settings.exclude
        self.family = Family(checkpoint.config)
        roles = settings.projectors if settings.projectors is not None else (() if settings.include else ("q", "k"))
        require_known_roles(roles)
        if roles and not self.family.known:
            raise ConfigError(
                f"{checkpoint.store.root}: the roles of model_type {self.family.name!r} are not known, so --projectors"
                f" {','.join(roles)} cannot be used; {_choices(checkpoint, self.family)}"
            )
        self._roles = roles
        self._include = re.compile(settings.include) if settings.include else None
        self._refusal: LoadingRefusal = (lambda *_: None) if dense else loading_refusal(checkpoint)
        self.unmatched = [f"projector {role}" for role in roles] + (["--include"] if self._include else [])

    def select(self, info: TensorInfo) -> list[Selected]:
        """Return the entry of a tensor, or of each of its matrices."""
        if self._exclude and re.search(self._exclude, info.name):
            return [self._decide(info, info, self._role(info))]
        matrices = matrices_of(self._checkpoint, self.family, info)
        entries = [self._decide(info, matrix, matrix.role) for matrix in matrices]
        entries = entries or [self._decide(info, info, self._role(info))]
        if any(entry.chosen for entry in entries):
            refusal = self._refusal(info.name, any(entry.info.name != info.name for entry in entries))
            reason = next(entry.reason for entry in entries if entry.chosen)
            return [Selected(info, False, f"{reason}, but {refusal}")] if refusal else entries
        reason = entries[0].reason
        if is_stack(info) and reason == _NOT_SELECTED:
            reason = self._why_stack_not_selected(info)
        return [Selected(info, False, reason)]

    def _role(self, info: TensorInfo) -> str | None:
        return next(iter(self.family.role_of(info.name).roles), None)

    def _why_stack_not_selected(self, info: TensorInfo) -> str:
        """Why a stack of experts is copied, with a remedy: most weights of a mixture are in such stacks."""
        role = self.family.role_of(info.name)
        remedy = f"--projectors {role.roles[0]} selects" if role.roles else "--include REGEX with its name selects"
        return f"{_NOT_SELECTED}: a stack of {info.shape[0]} matrices, which {remedy}"

    def _decide(self, tensor: TensorInfo, info: TensorInfo | MatrixInfo, role: str | None) -> Selected:
        """Decide on `info`, which is `tensor` or a matrix of it."""
        names = (tensor.name, info.name)
        included = self._include is not None and any(self._include.search(name) for name in names)
        reason = f"projector {role}" if role in self._roles else ("--include" if included else "")
        if not reason:
            return Selected(info, False, _NOT_SELECTED)
        matched = {reason, "--include"} if included else {reason}
        self.unmatched = [criterion for criterion in self.unmatched if criterion not in matched]
        if self._exclude and any(re.search(self._exclude, name) for name in names):
            return Selected(info, False, f"{reason}, but --exclude")
        if self.family.is_beyond(tensor.name) and not included:
            return Selected(
                info, False, f"{reason}, but in a layer after the model's last, which no token passes through"
            )
        return Selected(info, True, reason)


def _choices(checkpoint: Checkpoint, family: Family) -> str:
    """A description of what can be selected."""
    names = (name for name, info in checkpoint.tensors.items() if is_matrix(info) or is_stack(info))
    kinds = sorted(set(map(tensor_kind, names)))
    roles = f"; the roles of its family are {','.join(family.roles)}" if family.known else ""
    return f"choose by --include among {', '.join(kinds[:_SHOWN])}{' …' if len(kinds) > _SHOWN else ''}{roles}"
