"""Large tensors on the CPU without a page fault for every 4 KB of them.

glibc asks the kernel for each block above 32 MB and gives it back when it is freed; the next tensor
of that size then costs a page fault, and the zeroing of a page, for every 4 KB. In sequences of
16,000 tokens and more that takes as long as the arithmetic. `keep_freed_memory` has the process
keep what it once had: memory stays at its peak, as with torch's allocator on GPUs.

Every `lowline` command and every training process calls it; a program of your own may, once.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of <malloc.h>
_TOP_PAD = 64 << 20  # bytes that the heap grows by at least


def keep_freed_memory() -> bool:
    """Keep freed blocks for later ones; returns whether this C library can (glibc does).

    It holds for the whole process, from now on, and leaves accelerators' memory as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(name, value) == 1 for name, value in settings])
