"""`check_equivalence`: are a masked model and its compacted or reloaded form the same function?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from topoprune.compaction.differences import (
    OutputDifference,
    Tolerance,
    class_name,
    compare_outputs,
    merge_rows,
    on_device_of,
    outputs_of,
    tolerance_for,
)
from topoprune.compaction.generating import check_generation, compare_generation
from topoprune.masks import unwrap

__all__ = ["Equivalence", "check_equivalence"]

_REMEMBERED = ("_previous_max_cache_length", "_cache")  # what a static cache leaves on a model


@dataclass(frozen=True)
class Equivalence:
    """What `check_equivalence` found; true if and only if everything compared is equal.

    Args:
        outputs: one row per compared output.
        tolerances: the tolerance of all floating outputs.
        reference, candidate: class names of the models.
        batches: number of batches compared.
        skipped: floating outputs of both that cannot be compared: attention maps of different numbers of heads.
    """

    outputs: tuple[OutputDifference, ...]
    tolerances: Tolerance
    reference: str
    candidate: str
    batches: int
    skipped: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """True if every output is equal within tolerance."""
        return all(row.equal for row in self.outputs)

    @property
    def worst(self) -> OutputDifference:
        """The output that comes closest to its tolerance, or exceeds it most."""
        return max(self.outputs, key=lambda row: row.ratio)

    def __bool__(self) -> bool:
        return self.equal

    def require(self) -> Equivalence:
        """Return self.

        Raises:
            ValueError: the models are not equal; names the worst output.
        """
        if self.equal:
            return self
        row = self.worst
        raise ValueError(
            f"{self.candidate} is not the same function as {self.reference}: {row.output} differs by "
            f"{row.max_abs:.3g}, {row.max_rel:.3g} of its scale, in batch {row.batch}"
            f"{f' ({row.note})' if row.note else ''}; allowed in {self.tolerances.dtype}: {self._allowed()}"
        )

    def _allowed(self) -> str:
        atol = f" + {self.tolerances.atol:.2g}" if self.tolerances.atol else ""
        return f"{self.tolerances.rtol:.2g} of the scale{atol}"

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "NOT EQUAL"
        width = max(len("output"), *(len(row.output) for row in self.outputs))
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        lines = [
            f"{verdict}: {self.candidate} against {self.reference}, {batches}, {self.tolerances.dtype}; "
            f"allowed: {self._allowed()}",
            f"{'output':<{width}}  {'max abs':>9}  {'of scale':>9}  {'of allowed':>10}",
        ]
        for row in self.outputs:
            mark = "" if row.equal else "  UNEQUAL"
            lines.append(
                f"{row.output:<{width}}  {row.max_abs:>9.2e}  {row.max_rel:>9.2e}  {row.ratio:>10.2g}{mark}"
                f"{f'  {row.note}' if row.note else ''}"
            )
        if self.skipped:
            lines.append(f"not compared, other numbers of heads: {', '.join(self.skipped)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description; infinite differences are None."""
        rows = [
            {
                key: None if isinstance(value, float) and math.isinf(value) else value
                for key, value in asdict(row).items()
            }
            for row in self.outputs
        ]
        return {**asdict(self), "equal": self.equal, "outputs": rows, "skipped": list(self.skipped)}


def check_equivalence(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    generate: bool = False,
    max_new_tokens: int = 8,
    caches: Sequence[str] = ("dynamic", "static"),
    rtol: float | None = None,
    atol: float | None = None,
) -> Equivalence:
    """Compare two models on the same inputs: every floating output and, on request, generation.

    Both run in eval mode without gradients; training flags are put back. Neither is changed.

    Args:
        reference: the masked dense model: under an open `MaskHandle`, or with the zeros in its weights.
        candidate: the compacted or reloaded one; it may be on another device.
        inputs: one batch, as a mapping of what ``forward`` takes, or several.
        generate: also generate greedily from each batch, with every cache implementation. In float32 and
            float64 the tokens must be equal. In coarser arithmetic a rounding may turn a near tie, so the
            candidate follows the reference's tokens. Either way the logits of every step are compared. The
            reference's generation config is used for both, its end token held back to the last step; padding of
            decoder-only models moves to the left.
        max_new_tokens: tokens to generate.
        caches: cache implementations of transformers: ``"dynamic"``, ``"static"`` (without compilation).
        rtol, atol: replace the defaults of `topoprune.compaction.differences.Tolerance`.

    Returns:
        The differences; true if all are within tolerance. Non-finite outputs are never equal. Caches and attention
        maps of different numbers of heads are not compared.

    Raises:
        ValueError: inputs that are empty or no mappings, models of different dtypes or with different
            outputs, a class that cannot generate, an unknown cache.

    Complexity: two forward passes a batch; with `generate`, two generations a batch and cache.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from topoprune import apply, compact, extract, solve
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> model = BertModel(config).eval()
        >>> plan = solve(extract(model, include=("neurons",)), budget=5, problem="neurons")
        >>> smaller = compact(model, plan)
        >>> with apply(model, plan):
        ...     bool(check_equivalence(model, smaller, {"input_ids": torch.tensor([[1, 2, 3]])}))
        True
    """
    batches = _batches(inputs)
    tolerance = tolerance_for(reference, candidate, rtol, atol)
    if generate:
        check_generation(reference, candidate, max_new_tokens, caches)
    rows: list[OutputDifference] = []
    skipped: dict[str, None] = {}
    with torch.no_grad(), _evaluating(reference, candidate):
        for number, batch in enumerate(batches):
            ours = outputs_of(reference(**on_device_of(reference, batch)))
            theirs = outputs_of(candidate(**on_device_of(candidate, batch)))
            found, apart = compare_outputs(ours, theirs, tolerance, number)
            rows += found
            skipped |= dict.fromkeys(apart)
            for cache in caches if generate else ():
                rows += compare_generation(reference, candidate, batch, max_new_tokens, cache, tolerance, number)
    names = class_name(reference), class_name(candidate)
    return Equivalence(merge_rows(rows), tolerance, *names, len(batches), tuple(skipped))


def _batches(inputs: Any) -> list[Mapping[str, Any]]:
    """Return the batches; ValueError if there are none, or one is no mapping with a filled tensor."""
    if isinstance(inputs, Mapping):
        batches = [inputs]
    elif isinstance(inputs, Iterable) and not isinstance(inputs, (torch.Tensor, str, bytes)):
        batches = list(inputs)
    else:
        raise ValueError(
            f"inputs is a {type(inputs).__name__}; expected a batch (a mapping from argument names of forward to "
            'tensors, e.g. {"input_ids": ...}) or several'
        )
    if not batches:
        raise ValueError('inputs is empty; give at least one batch, e.g. {"input_ids": ...}')
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {number} of inputs is a {type(batch).__name__}; expected a mapping from argument names of "
                'forward to tensors, e.g. {"input_ids": ...}'
            )
        if not any(isinstance(value, torch.Tensor) and value.numel() for value in batch.values()):
            raise ValueError(f"batch {number} of inputs has no tensor with entries in it; its keys are {list(batch)}")
    return batches


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own flag again, and what `generate` remembers is gone."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    kept = [{name: vars(bare)[name] for name in _REMEMBERED if name in vars(bare)} for bare in map(unwrap, models)]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
        for bare, values in zip(map(unwrap, models), kept, strict=True):
            for name in _REMEMBERED:
                vars(bare).pop(name, None)
            vars(bare).update(values)
