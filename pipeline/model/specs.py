"""From settings to the specs of one matrix, and what a budget leaves for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.errors import ConfigError
from pipeline.matrix_config import MatrixSettings
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.matrix_info import MatrixInfo
from swsc_core.bits import ChannelAxis, Geometry
from swsc_core.budget import solve_budget
from swsc_core.menu import largest_within, uncompensated
from swsc_core.methods import method_named
from swsc_core.safetensors_header import DTYPES
from swsc_core.spec import Spec, SwscSpec

_PAPER_PRESET_BITS = 3.0


def budget_bytes(checkpoint: Checkpoint, matrices: Sequence[MatrixInfo], settings: MatrixSettings) -> int:
    """Bytes that --bits leaves for the matrices that are compressed.

    Raises:
        ConfigError: over the whole model, what is not compressed takes all of them.
    """
    assert settings.bits is not None
    count = sum(info.count for info in matrices)
    if settings.bits_over == "selected":
        return int(settings.bits * count / 8)
    others = checkpoint.nbytes - sum(info.nbytes for info in matrices)
    budget = int(settings.bits * checkpoint.weights / 8) - others
    if budget <= 0:
        raise ConfigError(
            f"bits {settings.bits:g} over the model: tensors that are not compressed take"
            f" {8 * others / checkpoint.weights:.3f} bits a weight alone; compress more of them, or raise --bits"
        )
    return budget


def require_affordable(matrices: Sequence[MatrixInfo], budget: int, settings: MatrixSettings) -> None:
    """Raise ConfigError if even the smallest specs of the menu are larger than the budget."""
    least = {info: _least_bytes(info, settings) for info in matrices}
    if sum(least.values()) > budget:
        count = sum(info.count for info in matrices)
        worst = max(matrices, key=lambda info: least[info] / info.count)
        raise ConfigError(
            f"bits {settings.bits:g} over the {settings.bits_over}: {8 * budget / count:.3f} bits a weight are left for the"
            f" selected matrices, the least is {8 * sum(least.values()) / count:.3f} ({worst.name}, shape"
            f" {list(worst.shape)}: {8 * least[worst] / worst.count:.3f}); raise --bits, or --exclude what takes most"
        )


def _least_bytes(info: MatrixInfo, settings: MatrixSettings) -> int:
    shape, nothing = info.shape, settings.model_copy(update={"bits": 0.0})
    return _provisional(info.name, shape, info.dtype, nothing).stored_bytes(shape, value_bits(info.dtype, settings))


def resolve(name: str, shape: tuple[int, int], dtype: str, settings: MatrixSettings) -> tuple[Spec, ...]:
    """The spec or, for the axis "auto", the specs of one matrix; ConfigError names what does not fit."""
    spec_type = method_named(settings.method).spec_type
    resolver = _RESOLVERS.get(spec_type)
    return (
        resolver(name, shape, dtype, settings)
        if resolver
        else (spec_type.of_settings(settings, settings.bits or _PAPER_PRESET_BITS),)
    )


def _resolve_swsc(name: str, shape: tuple[int, int], dtype: str, settings: MatrixSettings) -> tuple[Spec, ...]:
    if settings.preset != "paper":
        return (_provisional(name, shape, dtype, settings),)
    if settings.channel_axis != "auto":
        return (_swsc_spec(name, shape, settings.channel_axis, dtype, settings),)
    first = _swsc_spec(name, shape, "output", dtype, settings)
    width = value_bits(dtype, settings)
    true_bits = 8 * first.stored_bytes(shape, width) / (shape[0] * shape[1])
    share = settings.cluster_share
    if settings.clusters is not None or settings.rank is not None:  # the numbers given say what share they mean
        clusters_alone = replace(first, rank=0)
        share = clusters_alone.stored_bytes(shape, width) / first.stored_bytes(shape, width)
    try:
        k, r = solve_budget(Geometry(*shape, "input"), true_bits, cluster_share=share, value_bits=width)
    except ValueError:  # the budget of the one axis buys nothing on the other: then there is no choice to make
        return (first,)
    return first, _family(SwscSpec(k, r, "input", settings.n_init), settings)


Resolver = Callable[[str, tuple[int, int], str, MatrixSettings], tuple[Spec, ...]]
# of methods whose specs depend on the matrix; those of other methods are settings alone
_RESOLVERS: dict[type[Spec], Resolver] = {SwscSpec: _resolve_swsc}


def _provisional(name: str, shape: tuple[int, int], dtype: str, settings: MatrixSettings) -> SwscSpec:
    """The largest candidate within --bits, or the smallest one: an estimate until allocation chooses by measurement."""
    width = value_bits(dtype, settings)
    specs = uncompensated(shape, width)
    if not specs:
        raise ConfigError(f"{name}: shape {list(shape)} is too small to share by segments; --exclude it")
    return largest_within(specs, shape, width, settings.bits or 0) or specs[0]


def _swsc_spec(name: str, shape: tuple[int, int], axis: ChannelAxis, dtype: str, settings: MatrixSettings) -> SwscSpec:
    geometry = Geometry(*shape, axis)
    if settings.clusters is None and settings.rank is None:
        try:
            k, r = solve_budget(
                geometry,
                settings.bits if settings.bits is not None else _PAPER_PRESET_BITS,
                cluster_share=settings.cluster_share,
                value_bits=value_bits(dtype, settings),
                count=settings.count or ("true" if settings.bits is not None else "paper"),
            )
        except ValueError as error:
            raise ConfigError(f"{name}: {error}; raise --bits") from None
        return _family(SwscSpec(k, r, axis, settings.n_init), settings)
    k, r = settings.clusters or 0, settings.rank or 0
    if settings.segment_size is None and k >= geometry.channels:
        raise ConfigError(
            f"{name}: clusters {k} is out of range for {geometry.channels} {axis} channels; choose 0 to {geometry.channels - 1}"
        )
    if r > min(shape):
        raise ConfigError(f"{name}: rank {r} is out of range for shape {list(shape)}; choose 0 to {min(shape)}")
    return _family(SwscSpec(k, r, axis, settings.n_init), settings, name, shape)


def _family(spec: SwscSpec, settings: MatrixSettings, name: str = "", shape: tuple[int, int] | None = None) -> SwscSpec:
    """The spec with what the settings say beyond clusters, rank and axis; ConfigError if that does not fit `shape`."""
    spec = replace(
        spec, segment_size=settings.segment_size, codebooks=settings.codebooks, scaled=settings.scaled,
        metric=settings.metric, feedback=settings.feedback, rounds=settings.rounds or 0,
        centroid_bits=settings.centroid_bits, factor_bits=settings.factor_bits,
    )  # fmt: skip
    if shape and (refusal := spec.refusal(shape)):
        raise ConfigError(f"{name}: {refusal}")
    return spec


def value_bits(dtype: str, settings: MatrixSettings) -> int:
    """Bits of a value of the storage dtype."""
    if settings.storage_dtype:
        return 32 if settings.storage_dtype == "float32" else 16
    return 8 * DTYPES[dtype][1]
