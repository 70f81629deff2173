"""Memory that the C library keeps for the next step."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let a step have the memory of the step before.

    glibc gives the memory of large freed tensors back to the system, which clears it page by page
    when it is asked for again: in a step of `airbench94` 800,000 page faults, an eighth to a fifth
    of its time; up to a tenth of an epoch of `base`. Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # no tensor has pages of its own
