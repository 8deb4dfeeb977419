"""NeuroPrune's two penalties: their gradients, and their exact proximal steps.

Shape legend: R rows (units whose degree counts, or input dimensions), E entries of a row.
A row may be spread over several matrices ([gate_i, up_i]; [Q; K; V]); each is passed as a
(R, E_part) view, so nothing is concatenated.

References: NeuroPrune (arXiv 2404.01306), Eq. 1 and Eq. 2; Parikh & Boyd, Proximal Algorithms (2014);
for the l1 group with exponent 1/2: Hu, Li, Meng, Qin, Yang, Group sparse optimization via l_{p,q}
regularization, JMLR 18 (2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

__all__ = [
    "Scratch",
    "attachment_weights",
    "group_sqrt_gradient",
    "group_sqrt_penalty",
    "prox_group_sqrt",
    "prox_group_sqrt_by_sorting",
    "prox_weighted_l1",
    "weighted_l1_gradient",
    "weighted_l1_penalty",
]

Reading = Literal["a", "b"]
Parts = Sequence[torch.Tensor]


class Scratch:
    """Reusable work space, one flat buffer per dtype, device and slot.

    Fresh temporaries of a few MB come as new pages from the operating system at every step,
    which makes a broadcast minimum/maximum on CPU ten times slower than the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device, int], torch.Tensor] = {}

    def like(self, tensor: torch.Tensor, slot: int = 0) -> torch.Tensor:
        """Return an uninitialised tensor of the same shape, dtype, device and memory layout."""
        key = tensor.dtype, tensor.device, slot
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = self._buffers[key] = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        flat = buffer[: tensor.numel()]
        if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous():
            return flat.view(tensor.shape[::-1]).t()  # same layout: elementwise work stays sequential
        return flat.view(tensor.shape)


def attachment_weights(
    parts: Parts, epsilon: float, reading: Reading, delta: float = 0.01, scratch: Scratch | None = None
) -> torch.Tensor:
    """Return the (R, 1) weight of each row in Eq. 1, from the share n/E of entries below epsilon.

    Reading a: n/E (a dense start has no penalty). Reading b: 1 / (1 - n/E + delta) (a dense
    start is plain l1; rows with few links are penalised up to 1/delta times as much).

    Complexity: one pass over the rows.
    """
    scratch = scratch or Scratch()
    missing = torch.zeros(parts[0].shape[0], dtype=torch.float32, device=parts[0].device)
    entries = 0
    for part in parts:
        # abs, then an in-place comparison in the same dtype: three times faster than summing bools.
        missing += torch.abs(part, out=scratch.like(part)).lt_(epsilon).sum(dim=1)
        entries += part.shape[1]
    share = (missing / max(entries, 1)).unsqueeze(1)
    return share if reading == "a" else 1.0 / (1.0 - share + delta)


def weighted_l1_penalty(parts: Parts, weights_R1: torch.Tensor) -> torch.Tensor:
    """Return ``sum_i weight_i * |row_i|_1`` (Eq. 1 for one matrix)."""
    return sum(((part.abs().sum(dim=1, keepdim=True) * weights_R1).sum() for part in parts), torch.zeros(()))


def weighted_l1_gradient(part: torch.Tensor, weights_R1: torch.Tensor) -> torch.Tensor:
    """Return the (R, E) subgradient of Eq. 1, with the weights held constant; 0 at 0."""
    return part.sign() * weights_R1.to(part.dtype)


@torch.no_grad()
def prox_weighted_l1(parts: Parts, threshold_R1: torch.Tensor, scratch: Scratch | None = None) -> None:
    """Soft-threshold each row in place: entries up to the threshold become exactly 0."""
    scratch = scratch or Scratch()
    for part in parts:
        limit, clipped = threshold_R1.to(part.dtype), scratch.like(part)
        # minimum/maximum broadcast four times faster on CPU than clamp with tensor limits.
        torch.maximum(part, -limit, out=clipped)
        part.sub_(torch.minimum(clipped, limit, out=clipped))


def group_sqrt_penalty(parts: Parts) -> torch.Tensor:
    """Return ``sum_i sqrt(|row_i|_1)`` (Eq. 2 for one layer)."""
    return _row_l1(parts).sqrt().sum()


def group_sqrt_gradient(parts: Parts) -> list[torch.Tensor]:
    """Return subgradients of Eq. 2, one a part: sign / (2 sqrt(|row|_1)), 0 for a zero row."""
    norm = _row_l1(parts).sqrt().unsqueeze(1)
    slope = torch.where(norm > 0, 0.5 / norm, torch.zeros_like(norm))
    return [part.sign() * slope.to(part.dtype) for part in parts]


def _row_l1(parts: Parts) -> torch.Tensor:
    total = torch.zeros(parts[0].shape[0], dtype=torch.float32, device=parts[0].device)
    for part in parts:
        total += part.abs().sum(dim=1, dtype=torch.float32)
    return total


@torch.no_grad()
def prox_group_sqrt(parts: Parts, strength: float, *, max_iterations: int = 20, scratch: Scratch | None = None) -> None:
    """Apply the exact prox of ``strength * sum_i sqrt(|row_i|_1)`` in place.

    A minimiser is 0 or a soft-thresholded row with the smallest root t of
    ``2 t sqrt(s(t)) = strength``, s(t) = sum_j max(|a_j| - t, 0). The fixed point
    t <- strength / (2 sqrt(s(t))) rises to that root from t = strength / (2 sqrt(s(0))),
    at training strengths within float precision after one pass; rows still moving afterwards, near
    the point of collapse, are solved by sorting (`prox_group_sqrt_by_sorting`). The
    winner against 0 is decided by the objective.

    Args:
        parts: matrices with equal numbers of rows; a row is spread over all of them.
        strength: >= 0, a number (0 leaves the rows alone).

    Complexity: O(R E) per pass; O(E log E) for a row that collapses.
    """
    if strength <= 0:
        return
    scratch = scratch or Scratch()
    magnitude = [torch.abs(part, out=scratch.like(part, slot)) for slot, part in enumerate(parts)]
    total = magnitude[0].sum(dim=1, dtype=torch.float32)
    for part in magnitude[1:]:
        total += part.sum(dim=1, dtype=torch.float32)
    limit = _step(total, strength)
    entries = sum(part.shape[1] for part in parts)
    few = max(8, limit.numel() // 64)  # sorting that many rows is cheaper than another pass over all
    for _ in range(max_iterations):
        mass = _mass_above(magnitude, limit, scratch)
        new = _step(mass, strength)
        # The map contracts by at most this rate near the root, so the new value is off by at most
        # rate * |step|: no further pass is needed to know that it is exact to float precision.
        rate = strength * entries / (4 * mass * mass.sqrt())
        settled = (rate < 0.25) & (2 * rate * (new - limit).abs() <= 1e-6 * new)
        limit = new
        if int((~settled).sum()) <= few:
            break
    _finish(parts, magnitude, limit, mass, settled, strength, scratch)


def _step(mass: torch.Tensor, strength: float) -> torch.Tensor:
    return strength / (2 * mass.clamp_min(0).sqrt())


def _mass_above(magnitude: Parts, limit: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    threshold = limit.unsqueeze(1)
    total = torch.zeros_like(limit)
    for part in magnitude:
        above = torch.sub(part, threshold.to(part.dtype), out=scratch.like(part, len(magnitude)))
        total += above.relu_().sum(dim=1, dtype=torch.float32)
    return total


def _finish(
    parts: Parts,
    magnitude: Parts,
    limit: torch.Tensor,
    mass: torch.Tensor,
    settled: torch.Tensor,
    strength: float,
    scratch: Scratch,
) -> None:
    limit = limit.clone()
    open_rows = torch.nonzero(~settled).flatten()
    if open_rows.numel():
        joined = torch.cat([m[open_rows] for m in magnitude], dim=1)
        limit[open_rows] = _threshold_by_sorting(joined, strength).to(limit.dtype)
    # f(x) - f(0) = strength sqrt(s) - sum over the active of (a^2 - t^2) / 2. By Cauchy-Schwarz it
    # is negative once s^1.5 >= strength * E, so only the other rows need the exact comparison.
    # (1.01: the mass is that at the threshold before the last step.)
    entries = sum(part.shape[1] for part in magnitude)
    near = torch.nonzero(settled & (mass * mass.sqrt() < 1.01 * strength * entries)).flatten()
    if near.numel():
        joined = torch.cat([m[near] for m in magnitude], dim=1)
        worth = _beats_zero(joined, limit[near], strength)
        limit[near] = torch.where(worth, limit[near], torch.full_like(limit[near], torch.inf))
    prox_weighted_l1(parts, limit.unsqueeze(1), scratch)


def _beats_zero(magnitude_RE: torch.Tensor, limit_R: torch.Tensor, strength: float) -> torch.Tensor:
    a = magnitude_RE.double()
    t = limit_R.double().unsqueeze(1)
    active = a > t
    mass = torch.where(active, a - t, torch.zeros_like(a)).sum(dim=1)
    gain = torch.where(active, a * a - t * t, torch.zeros_like(a)).sum(dim=1) / 2
    return strength * mass.sqrt() < gain


def _threshold_by_sorting(magnitude_RE: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the (R,) threshold of each row; inf where the row goes to zero.

    With the k largest entries active and prefix sum p_k, t solves 4 t^2 (p_k - k t) = strength^2,
    a cubic whose smaller positive root is the local minimum; k is right if it separates the
    k-th from the next entry. All k are tried at once.
    """
    a = magnitude_RE.double()
    ordered, _ = a.sort(dim=1, descending=True)
    prefix = ordered.cumsum(dim=1)
    count = torch.arange(1, a.shape[1] + 1, device=a.device, dtype=a.dtype).unsqueeze(0)
    # t = (p_k / k) u with u^2 (1 - u) = c; the smaller root has u in (0, 2/3], by the trigonometric formula.
    scale = prefix / count
    c = strength**2 / (4 * scale**2 * prefix).clamp_min(torch.finfo(a.dtype).tiny)
    inside = (1 - 13.5 * c).clamp(-1, 1)
    angle = torch.arccos(inside)
    u = (1 + 2 * torch.cos((angle - 2 * torch.pi) / 3)) / 3
    t = u * scale
    following = torch.cat([ordered[:, 1:], torch.zeros_like(ordered[:, :1])], dim=1)
    slack = 1e-12 * ordered[:, :1]
    valid = (13.5 * c <= 2) & (t < ordered + slack) & (t >= following - slack) & (prefix > 0)
    mass = (prefix - count * t).clamp_min(0)
    squares = (ordered * ordered).cumsum(dim=1)
    value = strength * mass.sqrt() - (squares - count * t * t) / 2  # relative to f(0)
    value = torch.where(valid, value, torch.full_like(value, torch.inf))
    best, index = value.min(dim=1)
    chosen = t.gather(1, index.unsqueeze(1)).squeeze(1)
    return torch.where(best < 0, chosen, torch.full_like(chosen, torch.inf)).to(magnitude_RE.dtype)


@torch.no_grad()
def prox_group_sqrt_by_sorting(parts: Parts, strength: float) -> None:
    """The slow twin of `prox_group_sqrt`: every row by sorting. O(R E log E)."""
    if strength <= 0:
        return
    joined = torch.cat([part.abs() for part in parts], dim=1)
    prox_weighted_l1(parts, _threshold_by_sorting(joined, strength).unsqueeze(1))
