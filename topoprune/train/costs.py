"""What the units of a model cost: parameters, or FLOPs of a forward, as tables over the number of units kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import matrix_parameters
from topoprune.sites import Site
from topoprune.speed import probe
from topoprune.train.body import Body

__all__ = ["Costs", "count_flops", "evaluating", "flop_costs", "make_inputs", "parameter_costs", "sparsity_costs"]

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",  # torch leaves it out of its own counter
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


@dataclass(frozen=True, eq=False)
class Costs:
    """The cost of a whole model as a sum over its sites.

    Args:
        name: the budget it stands for. unit: what it is measured in.
        fixed: cost of all that cannot be pruned.
        tables: site name -> (n_units + 1,) float64, cost of keeping so many units, never falling.
        budget: cost that may stay at most.
    """

    name: str
    unit: str
    fixed: float
    tables: Mapping[str, np.ndarray]
    budget: float

    @property
    def dense(self) -> float:
        """Cost of the whole model before pruning."""
        return self.fixed + math.fsum(float(table[-1]) for table in self.tables.values())

    def total(self, kept: Mapping[str, int]) -> float:
        """Return the cost with so many units kept; sites that are not named are whole."""
        return self.fixed + math.fsum(float(table[kept.get(name, -1)]) for name, table in self.tables.items())

    def at(self, done: float) -> Costs:
        """Return the same costs with the budget that a ramp asks for at `done`, in [0, 1]."""
        return self if done == 1.0 else replace(self, budget=self.dense - done * (self.dense - self.budget))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, exact."""
        tables = {name: table.tolist() for name, table in self.tables.items()}
        return {"name": self.name, "unit": self.unit, "fixed": self.fixed, "tables": tables, "budget": self.budget}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Costs:
        """Rebuild from `to_dict` output."""
        return cls(**{**data, "tables": {name: np.array(table) for name, table in data["tables"].items()}})


def sparsity_costs(sites: Sequence[Site], sparsity: float, *, rounded: bool = False) -> Costs:
    """Return attention and FFN matrix entries per unit; the budget is what `sparsity` leaves.

    Without rounding the budget is half a neuron higher, so that the most that fits comes nearest to it.
    """
    tables = {s.name: np.arange(s.n_units + 1.0) * s.matrix_parameters_per_unit for s in _prunable(sites)}
    whole = matrix_parameters(sites)
    neurons = [s.matrix_parameters_per_unit for s in sites if s.kind == "neuron"]
    half = 0.0 if rounded else min(neurons, default=0) / 2
    fixed = whole - math.fsum(table[-1] for table in tables.values())
    return Costs("sparsity", "attention and FFN weights", fixed, tables, (1 - sparsity) * whole + half)


def parameter_costs(body: Body, budget: float | int) -> Costs:
    """Return parameters per unit, biases included; fixed are embeddings, norms, task heads.

    Args:
        body: the model; what was cut out of it already counts as before.
        budget: share of all parameters that stays (float), or their number (int).

    Raises:
        ValueError: a number that is larger than the model.
    """
    sites = _prunable(body.sites)
    now = {site.name: site for site in _prunable(body.sites_now)}
    there = sum(parameter.numel() for parameter in body.model.parameters())
    # A unit that was cut out took the same number of parameters with it as one that is there.
    gone = sum(
        (site.n_units - (now[site.name].n_units if site.name in now else 0)) * site.parameters_per_unit
        for site in sites
    )
    tables = {s.name: np.arange(s.n_units + 1.0) * s.parameters_per_unit for s in sites}
    dense = there + gone
    if isinstance(budget, int) and budget > dense:
        raise ValueError(f"parameters={budget} asks for more than there are: this model has {dense:,}")
    fixed = dense - math.fsum(table[-1] for table in tables.values())
    return Costs("parameters", "parameters", fixed, tables, budget if isinstance(budget, int) else budget * dense)


def flop_costs(body: Body, share: float, shape: tuple[int, int]) -> Costs:
    """Return FLOPs per unit in one forward, attention products included, as `torch.utils.flop_counter` counts them.

    By formula: a weight takes 2 FLOPs for each token that passes it, a query head 4 * width for each pair of
    tokens. How many tokens pass which projection (images, two stacks), and what the rest of the model takes,
    is seen in one forward of a single sequence; all FLOPs are proportional to the batch size.

    Args:
        body: the model; what was cut out of it already counts as before.
        share: of the dense model's FLOPs that stays. shape: batch size and length.

    Raises:
        ValueError: a model whose inputs cannot be made up, or a length it does not take.
    """
    batch, length = shape
    inputs = make_inputs(body.model, (1, length))
    with _tokens(body.model, body.sites_now) as tokens:
        counted = count_flops(body.model, inputs)
    per_unit = {site.name: _unit_flops(site, tokens) for site in _prunable(body.sites)}
    today = math.fsum(site.n_units * _unit_flops(site, tokens) for site in _prunable(body.sites_now))
    tables = {s.name: np.arange(s.n_units + 1.0) * (batch * per_unit[s.name]) for s in _prunable(body.sites)}
    costs = Costs("flops", "FLOPs", batch * (counted - today), tables, 0.0)
    return replace(costs, budget=share * costs.dense)


def make_inputs(model: nn.Module, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return a made-up batch of this shape (images: of this many), without a cache for generation.

    Raises:
        ValueError: a model that takes neither tokens nor images, or fewer positions.
    """
    batch, length = shape
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if getattr(model, "main_input_name", None) == "input_ids" and isinstance(positions, int) and length > positions:
        raise ValueError(f"shape={shape} asks for a length of {length}, the model takes {positions} tokens; lower it")
    made = {}
    for name, tensor in probe(model).items():
        made[name] = tensor[:1]
        if name != "pixel_values":
            repeats = -(-length // tensor.shape[1])
            made[name] = made[name].repeat(1, repeats)[:, :length]
        made[name] = made[name].repeat(batch, *[1] * (tensor.ndim - 1))
    return made


def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Return the FLOPs of one forward in eval mode, fused attention counted on every device."""
    from torch.utils.flop_counter import FlopCounterMode

    known = {getattr(torch.ops.aten, name): _attention_flops for name in _ATTENTION if hasattr(torch.ops.aten, name)}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with evaluating(model), counter:
        model(**inputs)
    return int(counter.get_total_flops())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, uncompiled and without a cache for generation, and everything put back after."""
    flags = {module: module.training for module in model.modules()}
    compiled = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    # Stacks of one model may have configs of their own.
    configs: dict[int, Any] = {id(c): c for m in model.modules() if getattr(c := vars(m).get("config"), "use_cache", 0)}
    calls = [module._compiled_call_impl for module in compiled]
    try:
        model.eval()
        for module in compiled:
            module._compiled_call_impl = None
        for config in configs.values():
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call
        for module, flag in flags.items():
            module.training = flag


def _prunable(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.kind != "input_dim"]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes (B, heads, tokens, width); grouped keys serve all query heads, so theirs are the heads that count."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


@contextmanager
def _tokens(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, int]]:
    """Count the tokens that pass the modules of the sites' matrices: module name -> tokens."""
    seen: dict[str, int] = {}
    names = {piece.param.rpartition(".")[0] for site in sites for piece in site.tensors if len(piece.shape) == 2}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = seen.get(name, 0) + args[0].numel() // args[0].shape[-1]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in sorted(names)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _unit_flops(site: Site, tokens: Mapping[str, int]) -> float:
    """Return the FLOPs of one unit for one sequence."""

    def passing(param: str) -> int:
        return tokens.get(param.rpartition(".")[0], 0)

    total = 0.0
    for piece in site.slices:
        if len(piece.shape) == 2:
            total += 2 * passing(piece.param) * (math.prod(piece.shape) // piece.shape[piece.axis]) * piece.width
    if site.kind in ("head", "kv_group"):
        queries = passing(site.writes[0].param)
        keys = [passing(p.param) for p in site.tensors if p.role == "k"] or [queries]
        total += 4 * queries * keys[0] * site.unit_width
    return total
