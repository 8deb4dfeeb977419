"""Graphs of the tiny models, each extracted once per session."""

from __future__ import annotations

from functools import lru_cache

from tests.tiny import build, inputs
from topoprune import ModelGraph, extract

__all__ = ["graph_of"]


@lru_cache
def graph_of(family: str, measure: str = "circuit-cosine", seed: int = 0) -> ModelGraph:
    model = build(family, seed)
    calibration = [inputs(model)] if measure == "output-gram" else None
    return extract(model, measure=measure, calibration=calibration, include=("heads", "neurons", "input_dims", "edges"))
