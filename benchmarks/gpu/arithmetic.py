"""Products, factorisations, TF32, and errors of a GPU as its libraries word them."""

import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu.finding import Bench, Finding
from pipeline.device import fix_arithmetic
from swsc_core.method.svd import svd_by_eigenvectors
from swsc_core.method.weighted_kmeans import nearest

_ASSERT = "torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')].sum().item()"
_FULL = "torch.empty(1 << 50, dtype=torch.uint8, device='cuda')"
_AFTER = "try:\n    torch.cuda.set_per_process_memory_fraction(0.5)\n    {}\nexcept BaseException as error:\n    print(requires_new_process(error), is_out_of_memory(error), type(error).__name__)"
_HALF = "total = torch.cuda.get_device_properties(0).total_memory; torch.empty(int(0.6 * total), dtype=torch.uint8, device='cuda')"


def tf32(bench: Bench) -> Iterator[Finding]:
    """Switched on from outside, it is switched off, and labels beyond 2048 are right."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        fix_arithmetic(bench.device)
        off = not torch.backends.cuda.matmul.allow_tf32 or not bench.on_gpu
        yield Finding("TF32 that was on is off", "yes" if off else "no", ok=off)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before if not bench.on_gpu else False
    centroids = torch.arange(4096.0).reshape(-1, 1).repeat(1, 2).to(bench.device)
    labels = nearest(centroids + 0.25, centroids)
    right = torch.equal(labels.cpu(), torch.arange(4096))
    yield Finding("nearest of 4096 centroids", "right" if right else "wrong", ok=right)


def products(bench: Bench) -> Iterator[Finding]:
    """Operations a second of a GEMM, by dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        n = bench.size(4096, 256)
        one = torch.randn(n, n, dtype=torch.float32).to(bench.device, dtype)
        yield Finding(f"GEMM {n}, {dtype}", 2 * n**3 / bench.seconds(lambda one=one: one @ one) / 1e12, "Top/s")  # type: ignore[misc]


def factorisations(bench: Bench) -> Iterator[Finding]:
    """The SVD by eigenvectors against cuSOLVER's own kinds, in seconds and error."""
    for m, n in ((1024, 4096), (2048, 2048)) if not bench.small else ((64, 128),):
        matrix = torch.randn(m, n).to(bench.device)
        yield Finding(f"SVD {m}×{n} by eigenvectors", bench.seconds(lambda a=matrix: svd_by_eigenvectors(a), 1), "s")  # type: ignore[misc]
        for driver in ("gesvdj", "gesvd") if bench.on_gpu else (None,):
            call = lambda a=matrix, d=driver: torch.linalg.svd(a, full_matrices=False, driver=d)  # noqa: E731
            yield Finding(f"SVD {m}×{n} {driver or 'LAPACK'}", bench.seconds(call, 1), "s")
        u, s, vh = svd_by_eigenvectors(matrix)
        worst = float(((u * s) @ vh - matrix).abs().max())
        yield Finding(f"SVD {m}×{n} by eigenvectors, largest error", worst, "", worst < 1e-4)
        again = all(torch.equal(x, y) for x, y in zip((u, s, vh), svd_by_eigenvectors(matrix), strict=True))
        yield Finding(f"SVD {m}×{n} by eigenvectors, twice", "equal" if again else "unlike", ok=again)
    square = torch.randn(bench.size(4096, 64), bench.size(4096, 64)).to(bench.device)
    spd = square @ square.T + len(square) * torch.eye(len(square), device=bench.device)
    yield Finding(f"Cholesky {len(spd)}", bench.seconds(lambda: torch.linalg.cholesky(spd)), "s")


def errors(bench: Bench) -> Iterator[Finding]:
    """Real errors, each in a process of its own, told apart as they must be."""
    if not bench.on_gpu:
        return
    for what, statement, wanted in (
        ("an index out of range", _ASSERT, "True False"),
        ("more memory than there is", _FULL, "True True"),
        ("more than a share of one half", _HALF, "True True"),
    ):
        script = "import torch\nfrom pipeline.device import is_out_of_memory, requires_new_process\n" + _AFTER.format(
            statement
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        said = done.stdout.strip() or done.stderr.strip()[-200:]
        yield Finding(f"error of {what}", said, ok=said.startswith(wanted))
