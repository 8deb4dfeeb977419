"""Compiled models: forwards that hooks must see run uncompiled.

torch.compile neither sees hooks that were added after a function was compiled nor compiles again for them, so what
is collected by hooks would silently be nothing. ``torch.compiler.set_stance`` runs the same function uncompiled for
a while and forgets nothing that was compiled.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

__all__ = ["EagerForwards"]


_wanted: weakref.WeakSet[EagerForwards] = weakref.WeakSet()  # a forgotten one wants nothing any more
_stance: list[Any] = []  # what to leave, once nobody wants it


class EagerForwards:
    """Keeps torch.compile out of the way while any of them is on, in the whole process."""

    def __init__(self) -> None:
        weakref.finalize(self, _settle)

    def set(self, on: bool) -> None:
        """Switch; does nothing if it is so already."""
        (_wanted.add if on else _wanted.discard)(self)
        _settle()

    def __enter__(self) -> None:
        self.set(True)

    def __exit__(self, *error: object) -> None:
        self.set(False)


def _settle() -> None:
    # The import takes a second, and without it there is no compiled function.
    if _wanted and not _stance and "torch._dynamo" in sys.modules:
        _stance.append(torch.compiler.set_stance("force_eager"))
        _stance[0].__enter__()
    elif not _wanted and _stance:
        _stance.pop().__exit__(None, None, None)
