"""Resolves settings to the specs of one matrix, and a budget to the bytes that all selected matrices may take."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.errors import ConfigError
from pipeline.settings.matrix import MatrixSettings
from swsc_core.allocation.budget import BitCount, solve_budget
from swsc_core.allocation.candidate_specs import largest_within, uncompensated
from swsc_core.compressed.registry import method_named
from swsc_core.method.spec import Spec, SwscSpec
from swsc_core.storage.bits import ChannelAxis, Geometry
from swsc_core.storage.safetensors_header import DTYPES


@dataclass(frozen=True)
class Budget:
    """Limit on the size of a matrix.

    Attributes:
        bits: bits per weight.
        count: what the bits count: "true" for stored bytes, "paper" as in Table II of the paper.
    """

    bits: float
    count: BitCount = "true"


def budget_of(checkpoint: Checkpoint, matrices: Sequence[MatrixInfo], settings: MatrixSettings) -> Budget:
    """Return the budget of each matrix.

    For a preset that allocates, it is the mean of what --bits leaves for all of them.

    Args:
        checkpoint: the source.
        matrices: the matrices that are selected.
        settings: bits, what they count and what they average over.

    Raises:
        ConfigError: the smallest candidates of all matrices exceed the budget, nothing is left for them, or they take
            no more without compression.
    """
    if settings.preset_definition.allocates:
        nbytes = budget_bytes(checkpoint, matrices, settings)
        _require_affordable(matrices, nbytes, settings)
        _require_below_dense(matrices, 8 * nbytes / max(1, sum(info.count for info in matrices)), settings)
        return Budget(8 * nbytes / max(1, sum(info.count for info in matrices)))
    if settings.bits is not None:
        _require_below_dense(matrices, settings.bits, settings)
    by_default: BitCount = settings.preset_definition.bits_counted if settings.bits is None else "true"
    return Budget(settings.budget_bits, settings.count or by_default)


def budget_bytes(checkpoint: Checkpoint, matrices: Sequence[MatrixInfo], settings: MatrixSettings) -> int:
    """Return the bytes that --bits leaves for the matrices that are compressed.

    Raises:
        ConfigError: the bits average over the whole model, and the tensors that are not compressed take all of them.
    """
    bits, count = settings.budget_bits, sum(info.count for info in matrices)
    if settings.bits_over == "selected":
        return int(bits * count / 8)
    others = checkpoint.nbytes - sum(info.nbytes for info in matrices)
    budget = int(bits * checkpoint.weights / 8) - others
    if budget <= 0:
        raise ConfigError(
            f"bits {bits:g} over the model: the tensors that are not compressed alone take"
            f" {8 * others / checkpoint.weights:.3f} bits per weight; compress more of them, or raise --bits"
        )
    return budget


def _require_affordable(matrices: Sequence[MatrixInfo], budget: int, settings: MatrixSettings) -> None:
    """Raise ConfigError if even the smallest candidates exceed `budget` bytes."""
    least = {info: _least_bytes(info, settings) for info in matrices}
    if sum(least.values()) > budget:
        count = sum(info.count for info in matrices)
        worst = max(matrices, key=lambda info: least[info] / info.count)
        raise ConfigError(
            f"bits {settings.budget_bits:g} over the {settings.bits_over}: {8 * budget / count:.3f} bits per weight are"
            f" left for the selected matrices, but they need at least {8 * sum(least.values()) / count:.3f}"
            f" ({worst.name}, shape {list(worst.shape)}: {8 * least[worst] / worst.count:.3f}); raise --bits, or"
            " --exclude the largest ones"
        )


def _require_below_dense(matrices: Sequence[MatrixInfo], bits: float, settings: MatrixSettings) -> None:
    """Raise ConfigError unless the budget of the matrices is below what they take without compression.

    Without allocation each matrix has the budget; with allocation all matrices share it.
    """
    dense = {info: 8 * DTYPES[info.dtype][1] for info in matrices}
    if settings.preset_definition.allocates:
        least = sum(dense[info] * info.count for info in matrices) / max(1, sum(info.count for info in matrices))
    else:
        least = min(dense.values(), default=math.inf)
    if bits >= least:
        left = f" over the model: {bits:.3f} bits per weight" if settings.bits_over == "model" else ""
        raise ConfigError(
            f"bits {settings.budget_bits:g}{left}: not below the {least:g} bits per weight of the selected matrices"
            " without compression; lower --bits"
        )


def _least_bytes(info: MatrixInfo, settings: MatrixSettings) -> int:
    smallest = _candidates(info, settings)[0]
    return smallest.stored_bytes(info.shape, value_bits(info.dtype, settings))


def resolve(info: MatrixInfo, settings: MatrixSettings, budget: Budget) -> tuple[Spec, ...]:
    """Return the specs of one matrix: one spec, or two for the channel axis "auto", of which the better one is kept.

    Args:
        info: the matrix.
        settings: method, clusters, rank and channel axis.
        budget: limit for a spec whose clusters and rank the settings do not give.

    Raises:
        ConfigError: clusters, rank or the budget do not fit the matrix.
    """
    spec_type = method_named(settings.method).spec_type
    resolver = _RESOLVERS.get(spec_type)
    return resolver(info, settings, budget) if resolver else (spec_type.from_settings(settings, budget.bits),)


def _resolve_swsc(info: MatrixInfo, settings: MatrixSettings, budget: Budget) -> tuple[Spec, ...]:
    if settings.preset_definition.allocates:
        return (_provisional(info, settings, budget),)
    if settings.channel_axis != "auto":
        return (_on_axis(info, settings.channel_axis, settings, budget),)
    return _on_both_axes(info, settings, budget)


Resolver = Callable[[MatrixInfo, MatrixSettings, Budget], tuple[Spec, ...]]
# Resolvers of methods whose specs depend on the matrix. The specs of other methods follow from the settings alone.
_RESOLVERS: dict[type[Spec], Resolver] = {SwscSpec: _resolve_swsc}


def _provisional(info: MatrixInfo, settings: MatrixSettings, budget: Budget) -> SwscSpec:
    """The largest candidate within the budget, or else the smallest; allocation replaces it by measurements."""
    specs = _candidates(info, settings)
    spec = largest_within(specs, info.shape, value_bits(info.dtype, settings), budget.bits) or specs[0]
    return replace(spec, rounds=settings.max_rounds)


def _candidates(info: MatrixInfo, settings: MatrixSettings) -> tuple[SwscSpec, ...]:
    """Candidates without SVD compensation, smallest first. Raises ConfigError if the matrix is too small for any."""
    specs = uncompensated(info.shape, value_bits(info.dtype, settings))
    if not specs:
        raise ConfigError(
            f"{info.name}: shape {list(info.shape)} is too small for vector quantization of segments; --exclude it"
        )
    return specs


def _on_both_axes(info: MatrixInfo, settings: MatrixSettings, budget: Budget) -> tuple[Spec, ...]:
    """The spec on the output axis, and the spec with equal stored bytes on the input axis."""
    shape, width, share = info.shape, value_bits(info.dtype, settings), settings.cluster_share
    first = _on_axis(info, "output", settings, budget)
    nbytes = first.stored_bytes(shape, width)
    if _is_explicit(settings):
        share = replace(first, rank=0).stored_bytes(shape, width) / nbytes
    try:
        k, r = solve_budget(Geometry(*shape, "input"), 8 * nbytes / info.count, cluster_share=share, value_bits=width)
    except ValueError:
        # The bytes of the output axis are too few for any spec on the input axis.
        return (first,)
    return first, _with_options(SwscSpec(k, r, "input", settings.n_init), settings)


def _on_axis(info: MatrixInfo, axis: ChannelAxis, settings: MatrixSettings, budget: Budget) -> SwscSpec:
    if _is_explicit(settings):
        return _explicit_spec(info, axis, settings)
    geometry, width = Geometry(*info.shape, axis), value_bits(info.dtype, settings)
    try:
        k, r = solve_budget(
            geometry, budget.bits, cluster_share=settings.cluster_share, value_bits=width, count=budget.count
        )
    except ValueError as error:
        raise ConfigError(f"{info.name}: {error}; raise --bits") from None
    return _with_options(SwscSpec(k, r, axis, settings.n_init), settings)


def _is_explicit(settings: MatrixSettings) -> bool:
    """Whether the settings give clusters and rank themselves."""
    return settings.clusters is not None or settings.rank is not None


def _explicit_spec(info: MatrixInfo, axis: ChannelAxis, settings: MatrixSettings) -> SwscSpec:
    """The spec of --clusters and --rank. Raises ConfigError if it does not fit the matrix."""
    k, r, channels = settings.clusters or 0, settings.rank or 0, Geometry(*info.shape, axis).channels
    if settings.segment_size is None and k >= channels:
        raise ConfigError(
            f"{info.name}: clusters {k} is out of range for {channels} {axis} channels; choose 0 to {channels - 1}"
        )
    if r > min(info.shape):
        raise ConfigError(
            f"{info.name}: rank {r} is out of range for shape {list(info.shape)}; choose 0 to {min(info.shape)}"
        )
    spec = _with_options(SwscSpec(k, r, axis, settings.n_init), settings)
    try:
        spec.require_shape(info.name, info.shape)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return spec


def _with_options(spec: SwscSpec, settings: MatrixSettings) -> SwscSpec:
    """The spec with the remaining options of the settings."""
    return replace(
        spec,
        segment_size=settings.segment_size,
        codebooks=settings.codebooks,
        scaled=settings.scaled,
        metric=settings.metric,
        feedback=settings.feedback,
        rounds=settings.max_rounds,
        centroid_bits=settings.centroid_bits,
        factor_bits=settings.factor_bits,
    )


def value_bits(dtype: str, settings: MatrixSettings) -> int:
    """Return the bits of one value in the storage dtype of the settings, or else in `dtype`, safetensors' name."""
    if settings.storage_dtype:
        return 32 if settings.storage_dtype == "float32" else 16
    return 8 * DTYPES[dtype][1]
