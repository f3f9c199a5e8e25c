"""Time model: predicted seconds of one core for the work on tensors, and of a whole compression."""

from collections.abc import Iterable
from functools import singledispatch

from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.planning.machine_speed import Speed
from pipeline.planning.plan import Plan
from pipeline.planning.tasks import LayerTask
from swsc_core.method.codebook_fit import CONJUGATE_STEPS
from swsc_core.method.kmeans import starts_and_refined
from swsc_core.method.pairwise import use_gram
from swsc_core.method.segmentation import slab_values
from swsc_core.method.spec import Spec, SwscSpec
from swsc_core.method.svd import is_exact
from swsc_core.method.weighted_kmeans import sample_size
from swsc_core.storage.bits import Geometry

# The constants of K-Means and SVD were fitted to runs of benchmarks/llama7b_shape.py and of the demo
# (docs/experiments.md).
# Lloyd iterations of a start, and of the refinement of one.
_STARTED, _REFINED = 20, 100
# Seconds of an iteration besides the arithmetic; a seed takes at least half of it.
_STEP_SECONDS = 3e-4
# Additions of rows that take as long as one distance to a mean and its share of the minimum.
_NEAREST = 10
# Additions that take as long as one point in the choice of the next seed, with all trials.
_SEED = 800
# Products of the matrix with `rank` vectors in a Krylov SVD.
_KRYLOV = 24
# Operations of a GEMM that take as long as one distance and its share of the minimum.
_DISTANCE = 60
# Passes over the sample of segments, for seeding and iterations.
_CODEBOOK_PASSES = 14
# Seconds of the small calls for one block of columns of a slab.
_BLOCK_SECONDS = 3e-4
# An exact SVD takes this many times m·n·min(m, n) operations.
_LAPACK = 25
# Seconds for restoring, measuring and packing one weight, with any method.
_WEIGHT_SECONDS = 7e-8
# Seconds until a worker is up.
_START_SECONDS = 10.0
# Speed of a common core, for the proportions of tasks whose time is not measured.
COMMON = Speed(gemm=5e10, additions=7e8, stream=4e8)


def wall_seconds(plan: Plan, form: str, speed: Speed, workers: int) -> float:
    """Wall time until the last worker ends. The largest layer alone may determine it."""
    compressing, streaming = core_seconds(plan, speed), stream_seconds(plan, form, speed)
    share = max((task.nbytes for task in plan.layers), default=0) / max(1, sum(task.nbytes for task in plan.layers))
    return _START_SECONDS + max((compressing + streaming) / workers, compressing * share)


def stream_seconds(plan: Plan, form: str, speed: Speed) -> float:
    """Time to read all of the source and to hash all of the output."""
    read = sum(task.nbytes for task in plan.layers) + sum(task.nbytes for task in plan.copies)
    return max(read, plan.stored_bytes_as(form)) / speed.stream


def core_seconds(plan: Plan, speed: Speed) -> float:
    """Return the seconds of one core for the compression of all matrices.

    The constants were fitted to one run of 4096×4096 matrices; benchmarks/time_estimate.py measures the error on other
    shapes.
    """
    return sum(layer_seconds(layer, speed) for layer in plan.layers)


def layer_seconds(layer: LayerTask, speed: Speed = COMMON) -> float:
    """Return the seconds of one core for the compression of the matrices of a layer."""
    return sum(matrix_seconds(info, specs, speed) for info, specs in layer.items)


def matrix_seconds(matrix: MatrixInfo, specs: Iterable[Spec], speed: Speed = COMMON) -> float:
    """Return the seconds of one core for the compression of one matrix by each of `specs`."""
    return sum(restoring_seconds(matrix.count) + _method_seconds(spec, matrix, speed) for spec in specs)


def restoring_seconds(weights: int) -> float:
    """Return the seconds of one core for restoring, measuring and packing `weights` weights."""
    return _WEIGHT_SECONDS * weights


def copying_seconds(nbytes: int, speed: Speed = COMMON) -> float:
    """Return the seconds for reading, hashing and writing `nbytes` bytes."""
    return nbytes / speed.stream


def forward_seconds(weights: int, tokens: int, speed: Speed = COMMON) -> float:
    """Return the seconds of one core for a forward pass of a model over some tokens."""
    return 2.0 * weights * tokens / speed.gemm


@singledispatch
def _method_seconds(spec: Spec, matrix: MatrixInfo, speed: Speed) -> float:
    """Seconds of the method besides those that every weight takes; 0 for a method without an estimate."""
    return 0.0


@_method_seconds.register
def _swsc_seconds(spec: SwscSpec, matrix: MatrixInfo, speed: Speed) -> float:
    m, n = matrix.shape
    svd = _LAPACK * min(m, n) if is_exact(min(m, n), spec.rank) else 2 * _KRYLOV * spec.rank
    clustering = _segment_seconds if spec.cuts_channels else _kmeans_seconds
    return clustering(m, n, spec, speed) + ((1 + spec.rounds) * svd * m * n / speed.gemm if spec.rank else 0)


def _segment_seconds(m: int, n: int, spec: SwscSpec, speed: Speed) -> float:
    """Products with the Hessian, distances to centroids (bound by memory, not by GEMM), and small calls per block."""
    layout, k = spec.layout((m, n)), spec.n_clusters
    passes = 1 + spec.rounds
    products = 2 * m * n * n * (passes + CONJUGATE_STEPS * spec.rounds) + n**3 if spec.needs_hessian else 0
    distances = _DISTANCE * k * (layout.count * passes + _CODEBOOK_PASSES * sample_size(k) * spec.codebooks)
    blocks = passes * layout.grid[1] * _BLOCK_SECONDS * -(-m * n // slab_values(m * n))
    return (products + distances) / speed.gemm + blocks


def _kmeans_seconds(m: int, n: int, spec: SwscSpec, speed: Speed) -> float:
    geometry, k = Geometry(m, n, spec.channel_axis), spec.n_clusters
    if k == 0:
        return 0.0
    points, length = geometry.channels, geometry.length
    starts, refined = starts_and_refined(points, k, spec.n_init)
    gram = use_gram(points, length, k, starts)
    once = 2 * points**2 * length / speed.gemm if gram else 0
    step = points**2 / speed.additions if gram else 2 * points * k * length / speed.gemm
    step += _NEAREST * k * points / speed.additions + _STEP_SECONDS
    seed = max(_SEED * points / speed.additions, _STEP_SECONDS / 2)
    return once + (_STARTED * starts + _REFINED * refined) * step + starts * k * seed
