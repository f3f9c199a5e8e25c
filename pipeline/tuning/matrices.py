"""Compressed matrices in a loaded model: their stored values can be replaced, and have gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from pipeline.models.parameter_lookup import ParameterView
from pipeline.models.stored_model import Model
from pipeline.tuning.state import MatrixValues, zeros_like
from swsc_core.compressed.registry import matrix_of
from swsc_core.finetune import Tunable, tunable_values


class TunedMatrices:
    """Some compressed matrices, and the parameters of the model that hold their restored weights."""

    def __init__(self, tunables: Mapping[str, Tunable], views: Mapping[str, ParameterView]) -> None:
        """Begin with the values of the compressed model, which the parameters hold."""
        self._tunables, self._views = tunables, views
        self._values = self.stored_values()

    def stored_values(self) -> MatrixValues:
        """The values of the compressed model."""
        return {name: tunable_values(tunable.matrix) for name, tunable in self._tunables.items()}

    def put(self, values: MatrixValues) -> None:
        """Replace the weights by those of other values."""
        for name, view in self._views.items():
            self._values[name] = self._tunables[name].rounded(values[name])
            view.put(self._tunables[name].restored(self._values[name]))

    @contextmanager
    def projected_gradients(self) -> Iterator[MatrixValues]:
        """Sums of the gradients of stored values, to which each backward pass adds; dense gradients are released."""
        sums: MatrixValues = {}
        matrices: dict[Tensor, list[str]] = {}
        for name, view in self._views.items():
            matrices.setdefault(view.parameter, []).append(name)
        with ExitStack() as stack:
            for parameter, names in matrices.items():
                stack.callback(parameter.requires_grad_, False)
                hook = parameter.requires_grad_().register_post_accumulate_grad_hook(self._projection(names, sums))
                stack.callback(hook.remove)
            yield sums

    def completed(self, sums: MatrixValues) -> MatrixValues:
        """Sums for all matrices: zero for one that no token reached."""
        return {name: sums[name] if name in sums else zeros_like(each) for name, each in self._values.items()}

    def _projection(self, names: list[str], sums: MatrixValues) -> Callable[[Tensor], None]:
        """Hook that adds the gradients of the stored values of `names` to `sums`, and releases the dense gradient."""

        def project(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for name in names:
                dense = self._views[name].of(parameter.grad).float()
                gradients = self._tunables[name].gradients(self._values[name], dense)
                before = sums.get(name)
                sums[name] = (
                    gradients if before is None else {part: before[part] + gradients[part] for part in gradients}
                )
            parameter.grad = None

        return project


def load_tunable(model: Model, name: str, device: str) -> Tunable:
    """A compressed matrix in the form that is tuned."""
    tensors = {part: tensor.to(device) for part, tensor in model.read_parts(name).items()}
    return matrix_of(tensors, model.entries[name]).tunable()
