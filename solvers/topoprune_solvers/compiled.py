"""Numba where it is installed: kernels are written once and compiled on first use.

Modules named ``*_kernels.py`` hold loops over arrays decorated with `kernel`. They are imported inside the
function that runs them, after asking `enabled`, so that importing topoprune_solvers stays quick. Where numba
is missing, numpy or Python code with the same answers runs instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, TypeVar

__all__ = ["VARIABLE", "choose", "enabled", "kernel"]

VARIABLE = "TOPOPRUNE_NUMBA"
Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def _installed() -> bool:
    return find_spec("numba") is not None


def enabled() -> bool:
    """Return True if kernels are compiled: numba is installed and the environment does not set TOPOPRUNE_NUMBA=0."""
    return _installed() and os.environ.get(VARIABLE, "1") != "0"


def kernel(function: Function) -> Function:
    """Compile a function with numba, cached on disk, without the interpreter lock; left as it is without numba.

    The uncompiled function stays callable for tests: as ``.py_func`` of the compiled one.
    """
    if not _installed():
        return function
    from numba import njit

    return njit(cache=True, nogil=True)(function)  # type: ignore[return-value]


def choose(function: Function) -> Function:
    """Return a kernel as it is where numba is enabled, else the Python function, kernels it calls included.

    The Python function is quick on lists and slow on arrays: hand it ``array.tolist()``.
    """
    return function if enabled() or not _installed() else _plain(function)


def _plain(function: Function) -> Function:
    bare = getattr(function, "py_func", None)
    if bare is None:
        return function
    scope = dict(bare.__globals__)
    for name in bare.__code__.co_names:
        if hasattr(scope.get(name), "py_func"):
            scope[name] = _plain(scope[name])
    return FunctionType(bare.__code__, scope, bare.__name__, bare.__defaults__)  # type: ignore[return-value]
