"""Checks that the recipes share."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["check_strengths", "one_of"]


def check_strengths(recipe: object, *names: str) -> None:
    """Raise ValueError unless these fields are finite numbers >= 0."""
    for name in names:
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; expected a finite number >= 0")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
