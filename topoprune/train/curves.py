"""How far a model's output moves when one site alone is cut: damage curves on inputs of training.

Shape legend: B batch, T tokens, C classes or vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import model_config
from topoprune.extraction.gram import decoder_mask
from topoprune.sites import Site
from topoprune.train.costs import evaluating
from topoprune.train.latency import layer_path

__all__ = ["Curve", "InputSampler", "OutputMeter", "curve_of", "option_counts"]

OPTIONS = (7 / 8, 3 / 4, 1 / 2, 1 / 4, 1 / 8, 0.0)  # of the way from the fewest units of a site to all it has
MOST_TOKENS = 4096
MOST_LOGITS = 2**26  # entries of the logits of one forward
MOST_KEPT_LOGITS = 2**24  # entries of the dense model's that are compared with: 64 MiB
MOST_SKIP_BYTES = 2**29  # layers' outputs that spare the forward up to the cut


@dataclass(frozen=True, eq=False)
class Curve:
    """Damage over the number of units that stay, in the planned units of a site.

    Args:
        kept: (c,) int64, rising. damage: (c,) float64, never rising; 0 for the last.
    """

    kept: np.ndarray
    damage: np.ndarray

    def at(self, counts: np.ndarray) -> np.ndarray:
        """Return the damage at any counts: linear between points, that of the end points beyond them."""
        return np.asarray(np.interp(counts, self.kept, self.damage))

    def to_list(self) -> list[list[float]]:
        """Return a JSON-ready description, exact."""
        return [self.kept.tolist(), self.damage.tolist()]


def option_counts(least: int, live: int, step: int = 1) -> list[int]:
    """Return the numbers of units at which a site is measured, rising, `live` left out.

    >>> option_counts(1, 12), option_counts(8, 64, 8)
    ([1, 2, 4, 7, 9, 11], [8, 16, 24, 40, 48, 56])
    """
    counts = {least + round(share * (live - least) / step) * step for share in OPTIONS}
    return sorted(count for count in counts if least <= count < live)


def curve_of(points: Mapping[int, float], live: int) -> Curve:
    """Return a curve that never rises with more units: every point is lifted to the largest damage above it.

    Args:
        points: units kept -> damage measured. live: units kept without a cut, damage 0.

    Raises:
        ValueError: a damage that is not finite.
    """
    kept = np.array(sorted({*points, live}), dtype=np.int64)
    damage = np.array([0.0 if k == live else points[k] for k in kept.tolist()])
    if not np.all(np.isfinite(damage)):
        raise ValueError(f"the output with {int(kept[~np.isfinite(damage)][0])} units kept is not finite")
    damage = np.maximum.accumulate(np.maximum(damage, 0.0)[::-1])[::-1]
    return Curve(kept, damage)


class InputSampler:
    """Keeps inputs of forwards of a model, by a hook, until there are enough.

    Args:
        model: live. rows: sequences (or images) at most. grad_only: pass over forwards without gradients.
    """

    def __init__(self, model: nn.Module, *, rows: int, grad_only: bool = True) -> None:
        self.model, self.rows, self.grad_only = model, rows, grad_only
        self.batches: list[dict[str, torch.Tensor]] = []
        self.autocast: tuple[str, str] | None = None
        self._signature = inspect.signature(model.forward)
        self._two_stacks = bool(getattr(model_config(model), "is_encoder_decoder", False))
        self._hook: Any = None

    @property
    def open(self) -> bool:
        """Whether forwards are watched."""
        return self._hook is not None

    def watch(self) -> None:
        """Take inputs from now on, beside those there are."""
        if self._hook is None:
            self._hook = self.model.register_forward_pre_hook(self._take, with_kwargs=True)

    def close(self) -> None:
        """Stop watching; the inputs stay."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def clear(self) -> None:
        """Stop watching and forget the inputs."""
        self.close()
        self.batches = []

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.grad_only and not torch.is_grad_enabled():
            return
        room, tokens = self._room()
        if not room:
            self.close()
            return
        given = {**self._signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        tensors = {name: value for name, value in given.items() if torch.is_tensor(value) and value.ndim > 0}
        if not self._two_stacks:  # which read their labels, shifted
            tensors.pop("labels", None)
        if not tensors:
            return
        first = next(iter(tensors.values()))
        main = tensors.get("input_ids", first)
        length = int(main.shape[1]) if main.ndim == 2 else 1
        count = min(room, len(first), max(1, tokens // max(1, length)))
        rows = {n: t[:count] if len(t) == len(first) else t for n, t in tensors.items()}
        self.batches.append({name: tensor.detach().clone() for name, tensor in rows.items()})
        kind = first.device.type
        if torch.is_autocast_enabled(kind):
            self.autocast = kind, str(torch.get_autocast_dtype(kind)).removeprefix("torch.")

    def _room(self) -> tuple[int, int]:
        """Return how many sequences and tokens may still be taken."""
        taken = sum(len(next(iter(batch.values()))) for batch in self.batches)
        mains = [batch.get("input_ids", next(iter(batch.values()))) for batch in self.batches]
        used = sum(main.numel() if main.ndim == 2 else len(main) for main in mains)
        vocabulary = int(getattr(model_config(self.model), "vocab_size", None) or 1)
        most = min(MOST_TOKENS, max(1, MOST_LOGITS // vocabulary))
        return (self.rows - taken if used < most else 0), most - used

    def state_dict(self) -> dict[str, Any]:
        """Return the inputs, tensors and strings only."""
        return {
            "open": self.open,
            "autocast": json.dumps(self.autocast),
            "batches": {str(i): dict(batch) for i, batch in enumerate(self.batches)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.clear()
        found = json.loads(state["autocast"])
        self.autocast = None if found is None else (found[0], found[1])
        self.batches = [dict(state["batches"][str(i)]) for i in range(len(state["batches"]))]
        if state["open"]:
            self.watch()


class OutputMeter:
    """Compares the output of a model cut at one site with that of the model as it is.

    The divergence is KL(model || cut) of classes, or of tokens over the positions that are no padding, a mean in
    nats; where there are no logits over at least two classes, the squared error relative to the mean square.

    Args:
        model: live, not wrapped. sites: as they are today. batches: inputs. autocast: (device type, dtype) or None.

    Raises:
        ValueError: the model returns neither logits nor hidden states, or outputs that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[Mapping[str, torch.Tensor]],
        autocast: tuple[str, str] | None = None,
    ) -> None:
        self.model, self.autocast = model, autocast
        self.forwards = 0
        device = next(model.parameters()).device
        self.batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        self._layer = {site.name: layer_path(model, sites, site) for site in sites}
        self._stack = {path: site.stack for site in sites if (path := self._layer[site.name])}
        self._order: list[str] = []
        self._outputs: list[dict[str, Any]] = []
        with self._running():
            self._expected = [self._reference(batch) for batch in self.batches]
        held = sum(_bytes(value) for outputs in self._outputs for value in outputs.values())
        self._skips = held <= MOST_SKIP_BYTES
        if not self._skips:
            self._outputs.clear()

    def divergence(self, site: Site, keep: np.ndarray, weight: torch.Tensor | None = None) -> float:
        """Return the divergence with some units of one site cut.

        Args:
            site: as it is today. keep: (n_units,) bool. weight: of its consumer, refitted; None for its own.
        """
        assert site.consumer is not None
        features = torch.from_numpy(np.flatnonzero(np.repeat(keep, site.unit_width)))
        total, count = 0.0, 0
        with self._running(), _cut(self.model.get_submodule(site.consumer), features, weight):
            for index, batch in enumerate(self.batches):
                with self._skipped(site, index):
                    found = _logits(self._forward(batch))
                expected, rows, kl = self._expected[index]
                total += _difference(expected, found, rows, kl)
                count += len(rows)
        return total / max(count, 1)

    def _forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        self.forwards += 1
        return self.model(**batch)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with evaluating(self.model):
            if self.autocast is None:
                yield
            else:
                kind, dtype = self.autocast
                with torch.autocast(kind, dtype=getattr(torch, dtype)):
                    yield

    def _reference(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Run the whole model; return its output at the rows compared, these rows, and whether they are logits."""
        outputs: dict[str, Any] = {}

        def record(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, result: Any) -> None:
                outputs[path] = result

            return hook

        hooks = [self.model.get_submodule(path).register_forward_hook(record(path)) for path in self._stack]
        try:
            result = self._forward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs.append(outputs)
        self._order = list(outputs)  # in the order the layers ran
        found = _logits(result)
        kl = "logits" in result and found.shape[-1] > 1
        flat = found.reshape(-1, found.shape[-1])
        rows = _real(self.model, batch, found)
        most = max(1, MOST_KEPT_LOGITS // max(1, len(self.batches) * flat.shape[-1]))
        if len(rows) > most:
            rows = rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
        kept = flat[rows].float()
        if not torch.isfinite(kept).all():
            raise ValueError("the model's output is not finite; training has diverged")
        return (kept.log_softmax(-1) if kl else kept), rows, kl

    @contextmanager
    def _skipped(self, site: Site, index: int) -> Iterator[None]:
        """Let the layers before a site's return what they returned in the whole model, without running."""
        own = self._layer[site.name]
        if not self._skips or own not in self._order:
            yield
            return
        before = self._order[: self._order.index(own)]
        last = {self._stack[path]: path for path in before}
        outputs = self._outputs[index]
        changed = []
        try:
            for path in before:
                layer = self.model.get_submodule(path)
                layer.forward = _constant(outputs[last[self._stack[path]]])
                changed.append(layer)
            yield
        finally:
            for layer in changed:
                del layer.forward


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@contextmanager
def _cut(consumer: nn.Module, features: torch.Tensor, weight: torch.Tensor | None) -> Iterator[None]:
    """Let a projection read some of its input features only."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        given: Any = consumer
        index = features.to(x.device)
        matrix = weight if weight is not None else given.weight.t() if _transposed(consumer) else given.weight
        return nn.functional.linear(x.index_select(-1, index), matrix.index_select(1, index).to(x.dtype), given.bias)

    changed: Any = consumer
    mine = "forward" in vars(consumer)
    before = vars(consumer).get("forward")
    changed.forward = forward
    try:
        yield
    finally:
        if mine:
            changed.forward = before
        else:
            del changed.forward


def _transposed(consumer: nn.Module) -> bool:
    """Whether a projection holds (in, out), as transformers' Conv1D does."""
    return not isinstance(consumer, nn.Linear)


def _logits(result: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        if name in result and torch.is_tensor(result[name]):
            found: torch.Tensor = result[name]
            return found
    if "start_logits" in result:  # spans of questions: where they start and where they end
        return torch.cat([result["start_logits"], result["end_logits"]])
    raise ValueError("allocation='output-kl' needs a model that returns logits or last_hidden_state; use 'uniform'")


def _real(model: nn.Module, batch: Mapping[str, torch.Tensor], found: torch.Tensor) -> torch.Tensor:
    """Return the rows of the flattened output that are no padding."""
    mask: torch.Tensor | None = None
    if found.ndim == 3:
        if getattr(model_config(model), "is_encoder_decoder", False):
            mask = decoder_mask(batch)
        else:
            mask = batch.get("attention_mask")
    if mask is None or mask.shape != found.shape[:-1]:
        return torch.arange(found.numel() // found.shape[-1], device=found.device)
    return (mask.reshape(-1) != 0).nonzero().squeeze(1)


def _difference(expected: torch.Tensor, found: torch.Tensor, rows: torch.Tensor, kl: bool) -> float:
    """Return the summed divergence over the rows."""
    kept = found.reshape(-1, found.shape[-1])[rows].float()
    if kl:
        other = kept.log_softmax(-1)
        return float((expected.exp() * (expected - other)).sum())
    scale = expected.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return float((kept - expected).square().mean(dim=-1).sum() / scale)


def _bytes(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (tuple, list)) else 0
