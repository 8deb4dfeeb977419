"""`Recipe.budget`: what to keep, how it is chosen, and when, as frozen configuration."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any, Literal

from topoprune.budgets import check_rounding
from topoprune.train.checks import check_strengths, one_of

__all__ = ["BudgetRecipe", "Distillation"]

BUDGETS = ("sparsity", "heads", "parameters", "flops", "latency")


@dataclass(frozen=True)
class Distillation:
    """What the pruned model learns from the dense one, beside its labels.

    The loss becomes ``(1 - logits) * task + logits * T^2 KL(teacher || student) + hidden * MSE``, with the
    Kullback-Leibler divergence of the softened outputs and the mean squared error of the hidden states, layer by
    layer, divided by the mean square of the teacher's.

    Args:
        logits: weight of the output's divergence, in [0, 1]. temperature: T, > 0.
        hidden: weight of the hidden states' error, >= 0.

    Raises:
        ValueError: numbers out of range, or both weights 0.

    References: Hinton et al. 2015 (arXiv 1503.02531); Xia et al. 2022, CoFi (arXiv 2204.00408).
    """

    logits: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        check_strengths(self, "logits", "hidden", "temperature")
        if self.logits > 1:
            raise ValueError(f"logits is {self.logits!r}; the weight of the output's divergence lies in [0, 1]")
        if self.temperature == 0:
            raise ValueError("temperature is 0; expected a number > 0")
        if self.logits == self.hidden == 0:
            raise ValueError("logits and hidden are both 0: nothing would be distilled; leave distill=None")


@dataclass(frozen=True)
class BudgetRecipe:
    """Ask for what you want and get exactly that at the end of a ramp.

    At least one budget is given: `sparsity`, `heads`, `parameters`, `flops` or `latency`. `heads` goes with
    any of the others; neurons then make up the rest.

    Args:
        sparsity: share of the attention and FFN matrix parameters to remove, in [0, 1).
            ``unit``: as whole heads (or KV groups) and FFN neurons, met within one unit;
            ``edge``: as single weights, met exactly.
        heads: how many heads (or KV groups) stay in the whole model, met exactly.
        parameters: how much of all the model's parameters stays at most, embeddings included: a share (float in
            (0, 1]) or a number (int).
        flops: share of the dense model's FLOPs in one forward that stays at most, in (0, 1].
        latency: share of the dense model's seconds for one forward, measured on the model's device, that stays at
            most, in (0, 1].
        shape: batch size and length of the forward that `flops` and `latency` mean.
        granularity: ``"unit"`` (removable structures), ``"edge"`` (weight masks from attachment-weighted edge
            selection) or ``"n:m"`` with numbers, such as ``"2:4"`` (n of every m consecutive weights stay).
        allocation: how the budget is shared out over layers: ``"uniform"`` (the same share of each) or
            ``"output-kl"`` (multiple-choice knapsack over the divergence of the output when one site alone is cut).
        remeasure: how many of the decisions measure the curves of ``"output-kl"`` afresh, evenly spread, the first
            among them.
        floor: least share of the units of a site that stays, in [0, 1); one unit stays in any case, except
            of heads under ``"uniform"``.
        heads_by: ``"soft"`` (soft domination: importance and redundancy together), ``"hard"`` (k-centre: smallest
            threshold whose dominating set fits) or ``"quadratic"`` (quadratic subset on the Gram matrix).
        neurons_by: ``"attachment"`` (energy with preferential attachment), ``"quadratic"``, ``"repaired"``
            (inverse-Gram elimination: the damage that is left after repair) or ``"domination"`` (soft domination on
            the graph of every neuron's 32 nearest by output). The last two are meant for ``repair="all"``, by which
            the neurons that stay take over from those that go; all but the first collect whole moments.
        input_dims: share of each attention's input dimensions to zero besides. They can be gathered, not
            removed, so they do not count towards a budget.
        input_group: input dimensions are zeroed in blocks of so many neighbours.
        ramp: first and last decision, as shares of training.
        ramp_shape: between them sparsity rises as ``s (1 - (1 - t)^3)`` (``"cubic"``), or by the same amount at every
            decision (``"stepwise"``).
        solves: number of decisions along the ramp.
        regrow: score by which units that are gone may return, or None: ``"gradient"`` (magnitude of their
            accumulated gradients: of the loss by a gate on the unit, see `topoprune.train.regrowth`).
        regrow_share: of the units of a site that are gone, how many may return at a decision at most, in [0, 1);
            rounded down, so 0.1 brings back neurons, and heads where 10 of a layer are gone.
        freeze_at: share of training from which on no unit returns; default: the end of the ramp.
        attachment: strength of preferential attachment in the scores of neurons, input
            dimensions and edges, in units of the mean score.
        eq1: reading of Eq. 1 that gives the degree cost.
        repair: which consumers are refitted by least squares when units go. final_repair: the same for the
            last decision; default: as `repair`.
        ridge: of the repair, relative to the mean of the moment's diagonal.
        tokens_per_unit: calibration tokens from training forwards, per input feature.
        solver: registry name of the solver for heads, one that takes the problem of `heads_by`. ``"exact"`` means
            local search where ``"quadratic"`` decides on more than 24 heads of a layer.
        rounding: in the end keep a number of features (units times their width) in every site that is a
            multiple of this (8, 16, 32, ...), as fast matrix kernels like it. At least `sparsity` is then removed,
            and less than one such multiple more. `heads` must allow for it.
        distill: learn from the dense model as well (`Distillation`); None: from labels only.
        solve_lag: optimizer steps between the step a decision is taken for and the one it is applied at; the
            solver runs beside training meanwhile.

    Raises:
        ValueError: no budget, numbers out of range, or choices that exclude each other.
    """

    sparsity: float | None = None
    _: KW_ONLY
    heads: int | None = None
    parameters: float | int | None = None
    flops: float | None = None
    latency: float | None = None
    shape: tuple[int, int] = (8, 128)
    granularity: str = "unit"
    allocation: Literal["uniform", "output-kl"] = "uniform"
    remeasure: int = 1
    floor: float = 0.0
    heads_by: Literal["soft", "hard", "quadratic"] = "soft"
    neurons_by: Literal["attachment", "quadratic", "repaired", "domination"] = "attachment"
    input_dims: float = 0.0
    input_group: int = 1
    ramp: tuple[float, float] = (0.1, 0.6)
    ramp_shape: Literal["cubic", "stepwise"] = "cubic"
    solves: int = 6
    regrow: Literal["gradient"] | None = None
    regrow_share: float = 0.1
    freeze_at: float | None = None
    attachment: float = 0.1
    eq1: Literal["a", "b"] = "b"
    repair: Literal["heads", "all", "none"] = "heads"
    final_repair: Literal["heads", "all", "none"] | None = None
    ridge: float = 1e-4
    tokens_per_unit: int = 4
    solver: str = "exact"
    rounding: int | None = None
    distill: Distillation | None = None
    solve_lag: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.distill, dict):  # from a file
            object.__setattr__(self, "distill", Distillation(**self.distill))
        for name in ("ramp", "shape"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_budgets()
        self._check_granularity()
        self._check_choices()
        self._check_numbers()

    def _check_budgets(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if not given:
            raise ValueError(
                "give sparsity= (share to remove, in [0, 1)) or heads= (how many stay), or both; or parameters=, "
                "flops= or latency= (share that stays)"
            )
        shares = [name for name in given if name != "heads"]
        if len(shares) > 1:
            raise ValueError(f"{' and '.join(shares)} are both given; a model can meet one of them exactly, and heads=")
        if self.sparsity is not None and not (math.isfinite(self.sparsity) and 0 <= self.sparsity < 1):
            raise ValueError(f"sparsity is {self.sparsity!r}; the share to remove must lie in [0, 1)")
        if self.heads is not None and (
            isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 0
        ):
            raise ValueError(f"heads is {self.heads!r}; expected how many heads (or KV groups) stay, an integer >= 0")
        for name in ("parameters", "flops", "latency"):
            value = getattr(self, name)
            if value is None or (name == "parameters" and isinstance(value, int) and not isinstance(value, bool)):
                continue
            if isinstance(value, bool) or not 0 < value <= 1:
                raise ValueError(f"{name} is {value!r}; the share that stays must lie in (0, 1]")
        if isinstance(self.parameters, int) and not isinstance(self.parameters, bool) and self.parameters < 1:
            raise ValueError(f"parameters is {self.parameters!r}; expected a share in (0, 1] or a number >= 1")
        if len(self.shape) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.shape):
            raise ValueError(f"shape is {self.shape!r}; expected batch size and length, two integers >= 1")

    def _check_granularity(self) -> None:
        pattern = self.pattern  # refuses what cannot be read
        if self.granularity == "unit":
            check_rounding(self.rounding)
            return
        foreign = [name for name in BUDGETS if name != "sparsity" and getattr(self, name) is not None]
        if foreign or self.input_dims or self.sparsity is None:
            raise ValueError(
                f"granularity={self.granularity!r} takes sparsity= alone; heads=, parameters=, flops=, latency= and "
                "input_dims= need granularity='unit'"
            )
        if self.rounding is not None:
            raise ValueError("rounding= counts the features that units keep; it needs granularity='unit'")
        if self.allocation != "uniform":
            raise ValueError("allocation= shares out units over layers; it needs granularity='unit'")
        if pattern is not None and not math.isclose(self.sparsity, 1 - pattern[0] / pattern[1], abs_tol=1e-9):
            raise ValueError(
                f"granularity={self.granularity!r} removes exactly {1 - pattern[0] / pattern[1]:.4g} of the weights, "
                f"not sparsity={self.sparsity!r}; give that"
            )

    def _check_choices(self) -> None:
        one_of("allocation", self.allocation, ("uniform", "output-kl"))
        one_of("heads_by", self.heads_by, ("soft", "hard", "quadratic"))
        one_of("neurons_by", self.neurons_by, ("attachment", "quadratic", "repaired", "domination"))
        one_of("ramp_shape", self.ramp_shape, ("cubic", "stepwise"))
        one_of("eq1", self.eq1, ("a", "b"))
        one_of("repair", self.repair, ("heads", "all", "none"))
        if self.final_repair is not None:
            one_of("final_repair", self.final_repair, ("heads", "all", "none"))
        if self.regrow is not None:
            one_of("regrow", self.regrow, ("gradient",))
        if self.distill is not None and not isinstance(self.distill, Distillation):
            raise ValueError(f"distill is {self.distill!r}; expected a Distillation(...) or None")

    def _check_numbers(self) -> None:
        if not 0 <= self.input_dims < 1:
            raise ValueError(f"input_dims is {self.input_dims!r}; the share of input dimensions to zero lies in [0, 1)")
        start, end = self.ramp
        if not 0 <= start <= end <= 1:
            raise ValueError(f"ramp is {self.ramp!r}; expected 0 <= start <= end <= 1, as shares of training")
        object.__setattr__(self, "ramp", (float(start), float(end)))
        for name in ("solves", "tokens_per_unit", "remeasure", "input_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected at least 1")
        if self.solve_lag < 0:
            raise ValueError(f"solve_lag is {self.solve_lag!r}; expected optimizer steps >= 0")
        for name in ("floor", "regrow_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a share in [0, 1)")
        if self.freeze_at is not None and not 0 <= self.freeze_at <= 1:
            raise ValueError(f"freeze_at is {self.freeze_at!r}; expected a share of training in [0, 1]")
        check_strengths(self, "attachment", "ridge")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """``(n, m)`` of ``granularity="n:m"``; None for units and edges."""
        if self.granularity in ("unit", "edge"):
            return None
        found = re.fullmatch(r"(\d+):(\d+)", str(self.granularity))
        if found is None or not 0 < int(found[1]) <= int(found[2]):
            raise ValueError(f"granularity is {self.granularity!r}; expected unit, edge, or n:m such as 2:4")
        return int(found[1]), int(found[2])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        given = asdict(self)
        return {"method": "budget", **given, "ramp": list(self.ramp), "shape": list(self.shape)}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all fields, in order."""
        return tuple(field.name for field in fields(cls) if field.name != "_")
