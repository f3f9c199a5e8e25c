"""The suite under the kernels of another processor: `make test KERNELS=avx2`, or KERNELS=avx2 before any pytest.

Which code multiplies matrices is chosen by three libraries, each by a variable of its own, read when it is first used:

- ATEN_CPU_CAPABILITY (avx512, avx2, default): PyTorch's own vectorised loops and attention;
- ONEDNN_MAX_CPU_ISA (ALL, AVX2, SSE41): oneDNN, which multiplies bfloat16 and float16 (AMX and AVX-512 where there are). It must not
  stand above the first: attention in bfloat16 asks the processor whether there is AMX, and then fails in kernels without it;
- MKL_ENABLE_INSTRUCTIONS (AVX512, AVX2, SSE4_2): MKL, which multiplies float32 and has LAPACK. On processors of Intel only;
- MKL_CBWR (AUTO, AVX2, COMPATIBLE, …): MKL's reproducible mode. It takes the same order of summation for every alignment, which others do not.
"""

from collections.abc import Mapping

KERNELS: Mapping[str, Mapping[str, str]] = {
    "native": {},
    # a processor with AVX2 and no AVX-512
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # products of a matrix and a vector depend on where the matrix begins in memory
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    # MKL's reproducible modes
    "cbwr-avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "compatible": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
VARIABLES = frozenset(variable for row in KERNELS.values() for variable in row)


def variables_of(name: str) -> Mapping[str, str]:
    """The variables of one row, to be set before torch is imported, for a process and those that it starts.

    Raises:
        ValueError: no row of that name.
    """
    if name not in KERNELS:
        raise ValueError(f"KERNELS={name} is not known; choose one of {', '.join(KERNELS)}")
    return KERNELS[name]
