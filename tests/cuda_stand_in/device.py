"""A stand-in for CUDA on a machine without any: tensors that report `cuda:0`, hold CPU values, and keep CUDA's rules.

To Python they are on cuda:0, to torch's own C++ on the CPU, so that autograd runs backward passes of them as well.
While a `StandIn` is entered, every operation on them, forward and backward, is done on the CPU, refused where CUDA
would refuse it (a CPU tensor beside CUDA ones, a CPU generator), and counted by the line of the project that asked for
it: launches, waits of the host, sums without a fixed order. It checks which branches are taken and what is asked for,
not what real kernels give.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.cuda_stand_in.rules import (
    VIEWS,
    divides_by_a_number,
    is_unordered,
    is_unordered_unless_switched,
    name_of,
    rounded_to_tf32,
    waits,
)

CUDA = torch.device("cuda", 0)
NAME = "Stand-in GPU"
_ROOT = str(Path(__file__).parents[2])
_PACKAGES = tuple(f"{_ROOT}/{package}/" for package in ("swsc_core", "pipeline"))
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm"}
_MAKES = {
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "scalar_tensor",
    "empty_strided",
    "eye",
    "linspace",
    "rand",
    "randn",
}


# what is asked of torch.cuda itself
_FEIGNED: dict[str, Callable[..., Any]] = {
    "_lazy_init": lambda: None,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
}


def _put(functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():
        setattr(torch.cuda, name, function)


class MixError(RuntimeError):
    """What CUDA would refuse: devices mixed."""


class OrderError(RuntimeError):
    """An operation without a deterministic kernel, while deterministic ones are asked for."""


class CudaTensor(Tensor):
    """A tensor on the stand-in; `value` holds its numbers."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "CudaTensor":
        made: CudaTensor = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=torch.device("cpu"), requires_grad=False,
        )  # fmt: skip
        made.value = value
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise MixError(f"{func} on a tensor of the stand-in, outside of it")


@dataclass
class Counts:
    """What was asked of the device, by line of the project.

    Attributes:
        launches: operations that are no views.
        waits: of the host.
        unordered: operations whose result depends on the order in which threads finish.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    unordered: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)

    def at(self, *functions: str) -> tuple[int, int]:
        """Launches and waits of lines in functions of these names."""
        return tuple(
            sum(n for line, n in found.items() if line.split()[-1] in functions)
            for found in (self.launches, self.waits)
        )  # type: ignore[return-value]


class StandIn(TorchFunctionMode):
    """The device; tensors come to it by `.to("cuda")` and the like, as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._dispatch = _Dispatch(self)
        self.inside = False  # a call with a tensor of the device: what C++ makes on the way is on it, too
        self._entered = 0
        self._own = {name: getattr(torch.cuda, name) for name in _FEIGNED}
        self._swaps = torch.__future__.get_swap_module_params_on_conversion()

    def __enter__(self) -> "StandIn":
        if not self._entered:
            _put(_FEIGNED)
            torch.__future__.set_swap_module_params_on_conversion(
                True
            )  # `.data =` would leave a parameter of no memory
            self._dispatch.__enter__()
        self._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered -= 1
        if not self._entered:
            self._dispatch.__exit__(*error)
            _put(self._own)
            torch.__future__.set_swap_module_params_on_conversion(self._swaps)

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """What is asked for inside alone."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            for name in vars(before):
                getattr(before, name).update(getattr(self.counts, name))
            self.counts = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        before, self.inside = self.inside, any(isinstance(x, CudaTensor) for x in tree_flatten((args, kwargs))[0])
        try:
            special = _SPECIAL.get(getattr(func, "__name__", ""))
            if special and (self.inside or special in (_tensor, _to)):
                return special(self, func, *args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self.inside = before

    def waited(self) -> None:
        self.counts.waits[_line()] += 1

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of torch's, on the CPU and by CUDA's rules."""
        name, flat = name_of(func), tree_flatten((args, kwargs))[0]
        ours = [x for x in flat if isinstance(x, CudaTensor)]
        others = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
        asked = kwargs.get("device")
        asked_for_cuda = asked is not None and torch.device(asked).type == "cuda"
        if not ours and not asked_for_cuda and not (self.inside and not others and name in _MAKES and _is_cpu(asked)):
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 1 if torch.backends.cuda.flash_sdp_enabled() else 0
        self._refuse_mix(name, args, flat, ours, others)
        values, named = tree_map(_value, (args, kwargs))
        if asked is not None:
            named["device"] = torch.device("cpu")
        self._count(name, args, values, bool(others))
        if name in _PRODUCTS and _tf32():
            values = tree_map(
                lambda x: rounded_to_tf32(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else x, values
            )
        if name == "histc" and not values[0].is_floating_point():  # of integers on CUDA alone
            return CudaTensor(func(values[0].float(), *values[1:], **named).to(values[0].dtype))
        if divides_by_a_number(name, args, kwargs):
            func_of_cuda = torch.ops.aten.mul_.Tensor if name == "div_" else torch.ops.aten.mul.Tensor
            reciprocal = torch.ones((), dtype=torch.promote_types(values[0].dtype, torch.float32)) / values[1]
            return _given(func, args, kwargs, func_of_cuda(values[0], reciprocal))
        return _given(func, args, kwargs, func(*values, **named))

    def _refuse_mix(self, name: str, args: Any, flat: list[Any], ours: list[Any], others: list[Tensor]) -> None:
        where = f"{name} at {_line()}"
        if any(isinstance(x, torch.Generator) and x.device.type != "cuda" for x in flat):
            raise MixError(f"{where}: a CPU generator for CUDA tensors")
        large = [x for x in others if x.dim()]
        if not ours or not large or name in ("copy_", "_to_copy"):
            return
        if name in ("index", "_unsafe_index", "index_put_", "index_put", "_index_put_impl_") and isinstance(
            args[0], CudaTensor
        ):
            wrong = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, CudaTensor) and x.dim()]
            if not wrong:
                return  # indices on the CPU are copied
        raise MixError(f"{where}: CPU tensors {[tuple(x.shape) for x in large]} beside CUDA ones")

    def _count(self, name: str, args: Any, values: Any, mixed: bool) -> None:
        where = _line()
        if name not in VIEWS:
            self.counts.launches[where] += 1
            self.counts.operations[name] += 1
        if waits(name, values) or (mixed and name in ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")):
            self.counts.waits[where] += 1
        switched = torch.are_deterministic_algorithms_enabled()
        if is_unordered(name, values):
            if switched:
                raise OrderError(f"{name} at {where} has no deterministic kernel")
            self.counts.unordered[f"{name} {where}"] += 1
        elif not switched and is_unordered_unless_switched(name, values):
            self.counts.unordered[f"{name} {where}"] += 1


class _Dispatch(TorchDispatchMode):
    """Below autograd, where every operation comes by."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_inference_mode_enabled():
            return self._device.run(func, args, kwargs or {})
        # what is made here is an ordinary tensor, or views of such would be refused
        with torch.inference_mode(False), torch.no_grad():
            return self._device.run(func, args, kwargs or {})


def _given(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """What an operation gives back: the tensor that it wrote to, or a new one on the device."""
    if isinstance(out, Tensor | list | tuple):
        returns = func._schema.returns
        written = {
            next(iter(a.alias_info.before_set)): (args[i] if i < len(args) else kwargs.get(a.name))
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        }
        if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return written[next(iter(returns[0].alias_info.before_set))]
    return tree_map(lambda x: CudaTensor(x) if isinstance(x, Tensor) else x, out)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, CudaTensor) else x


def _is_cpu(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _tf32() -> bool:
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" or torch.backends.cuda.matmul.allow_tf32


def _line() -> str:
    """The innermost line of the project: "swsc_core/method/codebook_fit.py:120 _assign"."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGES):
            return f"{file[len(_ROOT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere:0 -"


def _tensor(stand_in: StandIn, func: Any, data: Any, /, *args: Any, **kwargs: Any) -> Any:
    """torch.tensor and its like, which copy from the host."""
    asked = kwargs.pop("device", None)
    if asked is None or torch.device(asked).type != "cuda":
        return func(data, *args, **kwargs, **({} if asked is None else {"device": asked}))
    stand_in.waited()
    return CudaTensor(func(data, *args, **kwargs, device="cpu"))


def _to(stand_in: StandIn, func: Any, tensor: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """Tensor.to, .cpu and .cuda: to another device, another dtype, or neither."""
    name = func.__name__
    given = [*args, *kwargs.values()]
    other = next((x for x in given if isinstance(x, Tensor)), None)
    named = [torch.device(x) for x in given if isinstance(x, str | torch.device)]
    target = (
        torch.device(name)
        if name in ("cpu", "cuda")
        else other.device
        if other is not None
        else (named or [tensor.device])[0]
    )
    dtype = other.dtype if other is not None else next((x for x in given if isinstance(x, torch.dtype)), tensor.dtype)
    if isinstance(tensor, CudaTensor):
        if target.type == "cpu":
            if tensor.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError("the stand-in has no gradient of a copy to the host")
            stand_in.waited()
            return tensor.value.detach().to(dtype, copy=True)
        return (
            tensor if dtype == tensor.dtype and not kwargs.get("copy") else torch.ops.aten._to_copy(tensor, dtype=dtype)
        )
    if target.type != "cuda":
        return func(tensor, *args, **kwargs)
    return torch.ops.aten._to_copy(tensor, dtype=dtype, device=CUDA)


def _host(stand_in: StandIn, func: Any, tensor: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    if func.__name__ == "numpy":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    stand_in.waited()
    return _value(tensor).tolist()


def _backward(stand_in: StandIn, func: Any, loss: Any, gradient: Any = None, **kwargs: Any) -> None:
    """`Tensor.backward`, and `torch.autograd.backward`, which passes a tuple of one tensor."""
    (loss,) = loss if isinstance(loss, tuple) else (loss,)
    assert not {key for key, value in kwargs.items() if value}, "as the project calls it"
    with stand_in:  # hooks call torch again; and torch's own function would come back here
        ones = torch.ones_like(loss) if gradient is None else gradient
        _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _one_hot(stand_in: StandIn, func: Any, labels: Tensor, num_classes: int = -1) -> Tensor:
    """Without the look at the values that a CPU takes."""
    assert num_classes > 0, "the host would wait for the largest"
    with stand_in:
        return torch.zeros(*labels.shape, num_classes, dtype=torch.int64, device=CUDA).scatter_(
            -1, labels[..., None], 1
        )


_SPECIAL = {
    "tensor": _tensor, "as_tensor": _tensor, "to": _to, "cpu": _to, "cuda": _to, "numpy": _host, "tolist": _host,
    "backward": _backward, "one_hot": _one_hot,
}  # fmt: skip
