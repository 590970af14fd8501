"""How the C library keeps memory that was freed."""

import ctypes
import logging

log = logging.getLogger(__name__)

KEPT_BYTES = 64 * 2**20
"""Free memory at the end of the heap that is kept for the next request rather than given back."""

HEAP_BYTES = 8 * 2**20
"""Blocks below this size come from the heap, larger ones each straight from the kernel."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of bodies instead of fetching it anew for each request.

    By default it gives a freed block of some 100 KiB back to the kernel, and the next one is zeroed page by page: an echo of 240 kB
    took 250 to 300 µs of processor time, and 70 to 80 µs with this (``docs/adr/0005-our-own-http-protocol.md``). Other C libraries
    stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        log.debug("no mallopt in this C library")
        return
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, HEAP_BYTES)
