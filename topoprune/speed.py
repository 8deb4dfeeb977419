"""How much faster is the smaller model, measured side by side, and on what where there is no data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["compare_speed", "probe"]

_TIMING_SECONDS = 10.0


def probe(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens or pixels that the model takes; enough to tell two functions apart.

    Raises:
        ValueError: a model that takes neither tokens nor images of a known size.
    """
    generator, config = torch.Generator().manual_seed(seed), getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    parameter = next(model.parameters())
    if kind == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = (2, int(getattr(config, "num_channels", 3)), config.image_size, config.image_size)  # type: ignore[union-attr]
        return {"pixel_values": torch.randn(size, generator=generator).to(parameter)}
    if kind == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        # RoBERTa counts positions from 2.
        length = max(1, min(128, int(getattr(config, "max_position_embeddings", None) or 130) - 2))
        ids = torch.randint(0, config.vocab_size, (8, length), generator=generator).to(parameter.device)  # type: ignore[union-attr]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return batch | {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else batch
    raise ValueError(f"cannot make up inputs for a {type(model).__name__}; give calibration=[batch, ...]")


@torch.no_grad()
def compare_speed(
    dense: nn.Module, smaller: nn.Module, inputs: Mapping[str, Any], *, rounds: int = 9
) -> tuple[float, float]:
    """Return the seconds one batch takes in each model: medians of interleaved forwards.

    Fewer rounds where they would take more than ten seconds in all, but three at least.
    """
    device = next(dense.parameters()).device
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    models = (dense, smaller)
    modes = [model.training for model in models]
    took: tuple[list[float], list[float]] = ([], [])
    try:
        started = time.perf_counter()
        for model in models:
            model.eval()(**batch)  # warm-up
        for _ in range(rounds):
            for model, seconds in zip(models, took, strict=True):
                seconds.append(_forward_seconds(model, batch, device))
            if len(took[0]) >= 3 and time.perf_counter() - started > _TIMING_SECONDS:
                break
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    return statistics.median(took[0]), statistics.median(took[1])


def _forward_seconds(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    model(**batch)
    wait()
    return time.perf_counter() - started
