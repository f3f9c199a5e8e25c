"""Claims about the memory that a worker keeps after it has freed it."""

import subprocess
import sys

import pytest

_MIB = 1 << 20
_HOLES = f"""
import os
import sys
from pipeline.engine.malloc import return_freed_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

return_freed_blocks(int(sys.argv[1]))
bytearray(30 * {_MIB})  # once it is freed, glibc serves smaller blocks from its heap
blocks = [bytearray(2 * {_MIB}) for _ in range(64)]
full = resident()
del blocks[::2]
print((full - resident()) // {_MIB})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages by /proc and configures glibc")
@pytest.mark.parametrize(("weights", "given_back"), [(1 << 22, 64), (1 << 20, 0)])
def test_blocks_freed_between_others_are_given_back_where_matrices_are_large(weights: int, given_back: int) -> None:
    command = [sys.executable, "-c", _HOLES, str(weights)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) == pytest.approx(given_back, abs=4)
