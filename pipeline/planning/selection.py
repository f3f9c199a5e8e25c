"""Which matrices of a checkpoint are to be compressed: by the roles of its family, by an expression, less what is excluded.

Nothing is guessed: a model that the table of families does not know is asked for an expression, and a role or an
expression that selects nothing is a mistake.
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

_SHOWN = 12  # kinds of tensors in a message
_LEFT = "not selected"


@dataclass(frozen=True)
class Selected:
    """A matrix, or a tensor that stays whole; whether it is to be compressed, and why or why not."""

    info: TensorInfo | MatrixInfo
    chosen: bool
    reason: str


def select(checkpoint: Checkpoint, settings: MatrixSettings, dense: bool = False) -> list[Selected]:
    """Every tensor in the checkpoint's order; of one that joins several, its pieces, if any of them is chosen.

    Args:
        dense: the output holds restored weights, which transformers loads as it loads the source.

    Raises:
        ConfigError: an unknown role, a family without roles, a role or an expression that selects nothing.
        CheckpointError: a joined tensor whose shape does not fit the config.
    """
    chooser = _Chooser(checkpoint, settings, dense)
    found = [selected for info in checkpoint.tensors.values() for selected in chooser.of(info)]
    for why in chooser.unmet:
        raise ConfigError(f"{checkpoint.store.root}: {why} selects no tensor; {_choices(checkpoint, chooser.family)}")
    return found


class _Chooser:
    """What the settings say of one tensor after the other; `unmet` are the wishes that none of them has met yet."""

    def __init__(self, checkpoint: Checkpoint, settings: MatrixSettings, dense: bool) -> None:
        self._checkpoint, self._exclude = checkpoint, settings.exclude
        self.family = Family(checkpoint.config)
        roles = settings.projectors if settings.projectors is not None else (() if settings.include else ("q", "k"))
        require_known_roles(roles)
        if roles and not self.family.known:
            raise ConfigError(
                f"{checkpoint.store.root}: the roles of model_type {self.family.name!r} are not known, so --projectors"
                f" {','.join(roles)} says nothing; {_choices(checkpoint, self.family)}"
            )
        self._roles = roles
        self._include = re.compile(settings.include) if settings.include else None
        self._refusal: LoadingRefusal = (lambda *_: None) if dense else loading_refusal(checkpoint)
        self.unmet = [f"projector {role}" for role in roles] + (["--include"] if self._include else [])

    def of(self, info: TensorInfo) -> list[Selected]:
        """A tensor or its pieces."""
        if self._exclude and re.search(self._exclude, info.name):
            return [self._decide(info, info, self._role(info))]
        matrices = matrices_of(self._checkpoint, self.family, info)
        found = [self._decide(info, matrix, matrix.role) for matrix in matrices]
        found = found or [self._decide(info, info, self._role(info))]
        if any(one.chosen for one in found):
            closed = self._refusal(info.name, any(one.info.name != info.name for one in found))
            chosen = next(one.reason for one in found if one.chosen)
            return [Selected(info, False, f"{chosen}, but {closed}")] if closed else found
        reason = found[0].reason
        return [Selected(info, False, self._stack_left(info) if is_stack(info) and reason == _LEFT else reason)]

    def _role(self, info: TensorInfo) -> str | None:
        return next(iter(self.family.role_of(info.name).roles), None)

    def _stack_left(self, info: TensorInfo) -> str:
        """Why a stack is copied: most of a mixture's weights are in them, and none is to be passed over without a word."""
        role = self.family.role_of(info.name)
        how = f"--projectors {role.roles[0]} selects" if role.roles else "--include REGEX with its name selects"
        return f"{_LEFT}: a stack of {info.shape[0]} matrices, which {how}"

    def _decide(self, tensor: TensorInfo, own: TensorInfo | MatrixInfo, role: str | None) -> Selected:
        names = (tensor.name, own.name)
        included = self._include is not None and any(self._include.search(name) for name in names)
        why = f"projector {role}" if role in self._roles else ("--include" if included else "")
        if not why:
            return Selected(own, False, _LEFT)
        self.unmet = [wish for wish in self.unmet if wish != why and not (included and wish == "--include")]
        if self._exclude and any(re.search(self._exclude, name) for name in names):
            return Selected(own, False, f"{why}, but --exclude")
        if self.family.is_beyond(tensor.name) and not included:
            return Selected(
                own, False, f"{why}, but in a layer after the model's last, which text does not run through"
            )
        return Selected(own, True, why)


def _choices(checkpoint: Checkpoint, family: Family) -> str:
    """What may be selected, in words."""
    named = {tensor_kind(name) for name, info in checkpoint.tensors.items() if is_matrix(info) or is_stack(info)}
    kinds = sorted(named)
    roles = f"; the roles of its family are {','.join(family.roles)}" if family.known else ""
    return f"choose by --include among {', '.join(kinds[:_SHOWN])}{' …' if len(kinds) > _SHOWN else ''}{roles}"
