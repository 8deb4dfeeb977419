"""Running out of memory: recognise it, and try again with smaller blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["is_out_of_memory", "release_cached", "with_smaller_blocks"]

T = TypeVar("T")
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory on the host or on a device did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Host allocators and some backends raise plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def release_cached() -> None:
    """Give memory that is held but not used back to the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def with_smaller_blocks(build: Callable[[int], T], block: int, what: str, *, least: int = 1) -> T:
    """Return ``build(block)``; where memory does not suffice, warn and halve the block until it does.

    Args:
        build: starts afresh with blocks of a side. block: the side to begin with. what: is built, for the warning.
        least: smallest side that is worth trying.

    Raises:
        Exception: what `build` raises; the error of the allocator if not even blocks of side `least` fit.

    Example:
        >>> with_smaller_blocks(lambda side: side * 2, 8, "a graph")
        16
    """
    while True:
        try:
            return build(block)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or block < 2 * least:
                raise
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        block //= 2
        release_cached()
        warnings.warn(
            f"out of memory while building {what} ({reason}); going on with blocks of {block}: the same result, slower",
            stacklevel=3,
        )
