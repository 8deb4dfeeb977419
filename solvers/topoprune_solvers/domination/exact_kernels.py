"""The bit-set functions compiled for uint64 arrays: the same source, so the same answers.

Each function is compiled in the name space of this module, where `lowest` and `size` are single instructions.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from types import FunctionType
from typing import Any

from numba import types
from numba.extending import intrinsic

from topoprune_solvers.compiled import kernel
from topoprune_solvers.domination import bitset_batch, bitset_reductions, branch_and_bound

SOURCES = (bitset_reductions, branch_and_bound, bitset_batch)


@intrinsic  # type: ignore[untyped-decorator]
def lowest(typing_context: Any, mask: Any) -> Any:
    """Return the position of the lowest set bit of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def size(typing_context: Any, mask: Any) -> Any:
    """Return the number of set bits of a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def _compile_all() -> None:
    space = globals()
    # Numba's cache looks at the file of one function only: a digest of all sources in the names keeps stale code out.
    files = (__file__, *(str(source.__file__) for source in SOURCES))
    digest = zlib.crc32(b"".join(Path(file).read_bytes() for file in files))
    for source in SOURCES:
        for name, value in vars(source).items():
            if name in space:
                continue
            if isinstance(value, FunctionType):
                twin = FunctionType(value.__code__, space, f"{name}_{digest:08x}")
                twin.__qualname__ = twin.__name__
                space[name] = kernel(twin)
            elif isinstance(value, int | float) or name == "math":
                space[name] = value


_compile_all()
