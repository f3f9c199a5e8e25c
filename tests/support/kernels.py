"""Environment variables that make the test suite use the kernels of another processor: `make test KERNELS=avx2`.

KERNELS=avx2 before any pytest command has the same effect. Three libraries choose the code of matrix products. Each
reads variables of its own when it is first used:

- ATEN_CPU_CAPABILITY (avx512, avx2, default): PyTorch's own vectorised loops and attention.
- ONEDNN_MAX_CPU_ISA (ALL, AVX2, SSE41): oneDNN, for products in bfloat16 and float16 (with AMX and AVX-512 where
  available). It must not exceed the first variable: attention in bfloat16 checks whether the processor has AMX, and
  then fails in kernels without it.
- MKL_ENABLE_INSTRUCTIONS (AVX512, AVX2, SSE4_2): MKL, for products in float32 and LAPACK; Intel processors only.
- MKL_CBWR (AUTO, AVX2, COMPATIBLE, …): MKL's reproducible mode, whose order of summation is the same for every
  alignment.
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
    """The variables of a set of kernels, to be set before torch is imported; child processes inherit them.

    Raises:
        ValueError: there is no set of that name.
    """
    if name not in KERNELS:
        raise ValueError(f"KERNELS={name} is not known; choose one of {', '.join(KERNELS)}")
    return KERNELS[name]
