"""How far two models' outputs lie apart, and how far they may: the measure behind `check_equivalence`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from topoprune.masks import unwrap

__all__ = [
    "CACHES",
    "OutputDifference",
    "Tolerance",
    "class_name",
    "compare_outputs",
    "difference",
    "merge_rows",
    "on_device_of",
    "outputs_of",
    "tolerance_for",
]

CACHES = ("past_key_values", "mems", "state")  # what a model returns for its next call, not as a result
_PER_HEAD = ("attentions", "cross_attentions", "encoder_attentions", "decoder_attentions")
_TF32_EPS = 2.0**-10
# Rounding inside a sum of n terms grows like sqrt(n) / 2 eps; 4096 terms are a wide layer's.
_SUM_GROWTH = 32.0


@dataclass(frozen=True)
class Tolerance:
    """How far two correct runs may lie apart: ``|a - b| <= atol + rtol * scale``.

    `scale` is the largest magnitude of the reference's output, since rounding errors come from the sums
    behind an entry and not from the entry. For a scalar (a loss) it is at least that of the logits, whose absolute
    error a loss inherits however small it is itself.

    The default rtol is ``eps * growth * sqrt(2 M)`` for two runs of M matrix products: one rounding each, of
    independent sign, adds up like a random walk. `growth` is 1 in bfloat16, float16 and TF32, whose products
    accumulate in float32, and 32 in float32 and float64, where a sum of n terms is off by sqrt(n) / 2 eps and n
    is taken as 4096. The default atol is 0. For BERT-base that is 5e-5 in float32 and 0.1 in bfloat16, where
    only gross mistakes show: check in float32 where you can. Models that amplify rounding (saturated softmax,
    outputs that cancel) may need a larger rtol.

    Args:
        dtype: the coarsest the models compute in: ``"float32"``, ``"bfloat16"``, ``"tf32"``, ...
        rtol: relative to the scale.
        atol: absolute.
    """

    dtype: str
    rtol: float
    atol: float


@dataclass(frozen=True)
class OutputDifference:
    """One compared output, over all batches.

    Args:
        output: key in the model's output (``"logits"``, ``"hidden_states[1]"``), or
            ``"tokens[static]"``, ``"generated_logits[static]"`` for generation with that cache.
        max_abs: largest absolute difference; for tokens the number that differ. inf if not finite.
        max_rel: largest difference over the output's scale; for tokens the share that differs.
        ratio: largest difference over its tolerance; equal up to 1. For tokens 0 or inf.
        batch: index of the batch where `ratio` is largest.
        equal: whether all batches are within tolerance.
        note: what is wrong, or ``""``.
    """

    output: str
    max_abs: float
    max_rel: float
    ratio: float
    batch: int
    equal: bool
    note: str = ""


# -- models ----------------------------------------------------------------------------------------


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class, wrappers apart."""
    return type(unwrap(model)).__name__


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch on the model's device; floating inputs (pixels, embeddings) in its dtype."""
    device, dtypes = _device(model), _dtypes(model)
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in batch.items()
    }


def tolerance_for(
    reference: nn.Module, candidate: nn.Module, rtol: float | None = None, atol: float | None = None
) -> Tolerance:
    """Return the tolerance of two models: the defaults of `Tolerance` where a number is None.

    Raises:
        ValueError: models of different dtypes, negative or non-finite numbers.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; expected a finite number >= 0")
    ours, theirs = _dtypes(reference), _dtypes(candidate)
    if ours != theirs:
        raise ValueError(
            f"the models have different dtypes: {_text(ours)} ({class_name(reference)}) and {_text(theirs)} "
            f"({class_name(candidate)}); load or convert them alike"
        )
    dtype, eps, growth = _precision(reference, ours)
    products = sum(1 for module in reference.modules() if _is_product(module))
    default = eps * growth * math.sqrt(2 * max(1, products))
    return Tolerance(dtype, default if rtol is None else float(rtol), 0.0 if atol is None else float(atol))


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _text(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _precision(model: nn.Module, dtypes: Iterable[torch.dtype]) -> tuple[str, float, float]:
    """Return name, eps and growth of the coarsest arithmetic in use."""
    device = _device(model).type
    used = set(dtypes) or {torch.get_default_dtype()}
    if torch.is_autocast_enabled(device):
        used.add(torch.get_autocast_dtype(device))
    dtype = max(used, key=lambda each: torch.finfo(each).eps)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return "tf32", _TF32_EPS, 1.0
    return _text([dtype]), eps, 1.0 if eps > torch.finfo(torch.float32).eps else _SUM_GROWTH


def _is_product(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim > 1 and not isinstance(module, nn.Embedding)


# -- outputs ---------------------------------------------------------------------------------------


def outputs_of(result: Any) -> dict[str, torch.Tensor]:
    """Return name -> floating tensor for everything a model returned, caches apart.

    Raises:
        ValueError: there is none.

    >>> list(outputs_of({"logits": torch.zeros(1), "hidden_states": (torch.zeros(1), torch.zeros(1))}))
    ['logits', 'hidden_states[0]', 'hidden_states[1]']
    """
    if isinstance(result, Mapping):
        items = [(str(key), value) for key, value in result.items() if key not in CACHES]
    else:
        items = [("output", result)]
    found = dict(pair for key, value in items for pair in _tensors(key, value))
    if not found:
        raise ValueError(f"the model returned no floating tensor to compare, but a {type(result).__name__}")
    return found


def _tensors(key: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _tensors(f"{key}.{name}", part)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _tensors(f"{key}[{index}]", part)


def compare_outputs(
    reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor], tolerance: Tolerance, batch: int
) -> tuple[list[OutputDifference], list[str]]:
    """Compare what `outputs_of` returned for two models on one batch.

    Returns:
        A row per output, and the names of the attention maps of different numbers of heads, which are not
        compared.

    Raises:
        ValueError: different outputs, or different shapes.
    """
    skipped = []
    for key in dict.fromkeys((*reference, *candidate)):
        ours, theirs = reference.get(key), candidate.get(key)
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            continue
        # A layer without heads returns no attention map at all.
        if key.split("[")[0] in _PER_HEAD:
            skipped.append(key)
            continue
        found = [f"{key} {tuple(t.shape)}" if t is not None else f"no {key}" for t in (ours, theirs)]
        raise ValueError(
            f"the models return different outputs: {found[0]} (reference) and {found[1]} (candidate); compare models "
            "with the same head"
        )
    keys = [key for key in reference if key not in skipped]
    logits = max((_magnitude(reference[key]) for key in keys if key.endswith("logits")), default=0.0)
    rows = [difference(key, reference[key], candidate[key], tolerance, batch, least_scale=logits) for key in keys]
    return rows, skipped


def _magnitude(tensor: torch.Tensor) -> float:
    """Return the largest finite magnitude."""
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def difference(
    output: str,
    reference: torch.Tensor,
    candidate: torch.Tensor,
    tolerance: Tolerance,
    batch: int,
    *,
    least_scale: float = 0.0,
) -> OutputDifference:
    """Compare two tensors of one shape.

    Args:
        output, batch: for the row. reference, candidate: (...) floating.
        tolerance: what is allowed. least_scale: of scalars.

    >>> difference("x", torch.ones(2), torch.tensor([1.0, 1.5]), Tolerance("float32", 0.1, 0.0), 0).ratio
    5.0
    """
    bad = [
        f"{which} has {int((~torch.isfinite(tensor)).sum())} non-finite values"
        for which, tensor in (("the reference", reference), ("the candidate", candidate))
        if not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        return OutputDifference(output, math.inf, math.inf, math.inf, batch, False, " and ".join(bad))
    if reference.numel() == 0:
        return OutputDifference(output, 0.0, 0.0, 0.0, batch, True, "no entries")
    wide = torch.float64 if reference.dtype == torch.float64 else torch.float32
    gap = float((reference.to(wide) - candidate.to(reference.device, wide)).abs().max())
    scale = max(_magnitude(reference), least_scale if reference.ndim == 0 else 0.0)
    ratio = _over(gap, tolerance.atol + tolerance.rtol * scale)
    return OutputDifference(output, gap, _over(gap, scale), ratio, batch, ratio <= 1)


def _over(gap: float, limit: float) -> float:
    if gap == 0:
        return 0.0
    return gap / limit if limit > 0 else math.inf


def merge_rows(rows: Sequence[OutputDifference]) -> tuple[OutputDifference, ...]:
    """Return one row per output: the largest differences, batch and note of the worst."""
    merged: dict[str, OutputDifference] = {}
    for row in rows:
        other = merged.setdefault(row.output, row)
        worst = row if row.ratio > other.ratio else other
        merged[row.output] = OutputDifference(
            row.output,
            max(row.max_abs, other.max_abs),
            max(row.max_rel, other.max_rel),
            worst.ratio,
            worst.batch,
            row.equal and other.equal,
            worst.note,
        )
    return tuple(merged.values())
