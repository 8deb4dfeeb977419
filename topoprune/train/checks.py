"""Checks that the recipes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

__all__ = ["check_strengths", "one_of", "steps_needed"]


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


def steps_needed(name: str, value: int | None, needed: bool, recipe: object) -> int:
    """Return a number of optimizer steps, 0 if it is not given; ValueError if a recipe needs it, or for no number."""
    if value is None:
        if needed:
            raise ValueError(f"{type(recipe).__name__} needs {name}=, the number of optimizer steps")
        return 0
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a number of optimizer steps >= 1")
    return int(value)
