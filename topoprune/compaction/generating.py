"""Greedy generation with two models side by side: the part of `check_equivalence` behind ``generate=True``."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from topoprune.compaction.differences import (
    CACHES,
    OutputDifference,
    Tolerance,
    class_name,
    difference,
    on_device_of,
)
from topoprune.masks import unwrap

__all__ = ["check_generation", "compare_generation", "prompt_of"]

_KNOWN = ("dynamic", "static")
# `generate` makes these itself, or they only make sense in one forward.
_NOT_PROMPT = ("labels", "position_ids", "cache_position", *CACHES)
_EXACT = ("float32", "float64")


def check_generation(reference: nn.Module, candidate: nn.Module, max_new_tokens: int, caches: Sequence[str]) -> None:
    """Raise ValueError unless both models can generate that many tokens with these caches."""
    for model in (reference, candidate):
        can = getattr(unwrap(model), "can_generate", None)
        if not (callable(can) and can()):
            raise ValueError(
                f"{class_name(model)} cannot generate; leave out generate=True, or give models with a language "
                "modelling head"
            )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a number of tokens >= 1")
    unknown = [cache for cache in caches if cache not in _KNOWN]
    if unknown or not caches or isinstance(caches, str):
        raise ValueError(f"caches is {caches!r}; expected some of {', '.join(_KNOWN)}, e.g. ('dynamic',)")


def prompt_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what `generate` takes of a batch; a decoder-only model's padding moved to the left.

    Labels, positions and a decoder's own inputs are left out, and so is what is no tensor. Columns move by the
    attention mask alone, so that the real tokens keep their order.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> prompt_of(model, {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": mask})["input_ids"]
        tensor([[0, 5, 6]])
    """
    config: Any = unwrap(model).config
    prompt = {
        key: value
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and key not in _NOT_PROMPT and not key.startswith("decoder_")
    }
    mask = prompt.get("attention_mask")
    if config.is_encoder_decoder or mask is None or mask.ndim != 2:
        return prompt
    order = mask.ne(0).to(torch.uint8).argsort(dim=1, stable=True)
    return {
        key: torch.stack([row[at] for row, at in zip(value, order, strict=True)])
        if value.shape[:2] == mask.shape
        else value
        for key, value in prompt.items()
    }


def compare_generation(
    reference: nn.Module,
    candidate: nn.Module,
    batch: Mapping[str, Any],
    max_new_tokens: int,
    cache: str,
    tolerance: Tolerance,
    number: int,
) -> list[OutputDifference]:
    """Return the rows of one batch and one cache: tokens (float32 and float64), logits of every step.

    Where arithmetic is coarser than float32 the candidate follows the reference's tokens. Logits are left
    out where the tokens part, since they answer different prompts from there on.
    """
    config = _settings(reference, max_new_tokens, cache)
    tokens, ours = _generate(reference, batch, config)
    exact = tolerance.dtype in _EXACT
    found, theirs = _generate(candidate, batch, config, None if exact else tokens)
    rows = []
    if exact:
        rows.append(_token_row(tokens, found.to(tokens.device), ours, cache, number))
        if not rows[0].equal:
            return rows
    return [*rows, difference(f"generated_logits[{cache}]", ours, theirs, tolerance, number)]


def _settings(model: nn.Module, max_new_tokens: int, cache: str) -> Any:
    """Return the model's own generation config, made greedy, of fixed length, and never compiled."""
    from transformers import GenerationConfig

    config = copy.deepcopy(getattr(unwrap(model), "generation_config", None) or GenerationConfig())
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, (list, tuple)) else config.eos_token_id
    config.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_length=None,
        min_length=None,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else (end or 0),
        use_cache=True,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return config


def _generate(
    model: nn.Module, batch: Mapping[str, Any], config: Any, follow: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new tokens (B, T) and the logits they were chosen from (B, T, V)."""
    bare: Any = unwrap(model)
    prompt = prompt_of(model, on_device_of(model, batch))
    processors = [] if follow is None else [_Follow(follow)]
    result = bare.generate(**prompt, generation_config=copy.deepcopy(config), logits_processor=processors)
    logits = torch.stack(result.logits, dim=1)
    return result.sequences[:, -logits.shape[1] :], logits


class _Follow:
    """A logits processor that leaves one choice: the next token of (B, T) given ones."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self._tokens[:, self._step : self._step + 1].to(scores.device)
        self._step += 1
        return torch.full_like(scores, -math.inf).scatter(1, wanted, 0.0)


def _token_row(
    ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor, cache: str, number: int
) -> OutputDifference:
    name = f"tokens[{cache}]"
    if not bool(torch.isfinite(logits).all()):
        note = "the reference's logits are not finite"
        return OutputDifference(name, math.inf, math.inf, math.inf, number, False, note)
    apart = ours != theirs
    if not bool(apart.any()):
        return OutputDifference(name, 0.0, 0.0, 0.0, number, True)
    row, step = min((tuple(at) for at in apart.nonzero().tolist()), key=lambda at: at[1])
    best = logits[row, step].topk(2).values
    note = (
        f"row {row} parts at new token {step}: {int(theirs[row, step])} instead of {int(ours[row, step])} "
        f"(the reference's two best logits there are {float(best[0] - best[1]):.2g} apart)"
    )
    count = int(apart.sum())
    return OutputDifference(name, float(count), count / apart.numel(), math.inf, number, False, note)
