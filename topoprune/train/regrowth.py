"""Regrowth: units that are gone may return where the loss asks for them.

The score of a unit is the magnitude of the loss' derivative by a gate on it, ``|dL/dz| = |<dL/dW, W>|`` with W what it
writes with (its columns of the consumer; its own columns for an input dimension), summed over the optimizer steps
since the last decision. At z = 1, of a unit that stays, it is the first-order change of the loss if the unit
went; at z = 0, of one that is gone, if it came back with the weights it had: one scale for both.

A unit that is zero on both sides has no gradient at all: what it writes is zero, so its reads get none; what it reads
is zero, so there is nothing to write. Therefore the weights of units are kept when they go, and while a projection
that makes units runs, those of the gone ones stand in it. They are back at zero when it returns: the unit is computed,
writes nothing, and the gradient of what it would write says what it is worth. No output changes, and between
forward passes every masked weight is zero (T1).

References: Michel, Levy, Neubig 2019, Are sixteen heads really better than one? (the gate's derivative);
Molchanov et al. 2019, Importance estimation for neural network pruning; Evci et al. 2020, Rigging the lottery (units
return by gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.sharding import sharded
from topoprune.train.budget_recipe import BudgetRecipe

__all__ = ["Overlay", "Regrowth"]

Vectors = dict[str, dict[int, np.ndarray]]
"""Parameter name -> axis -> bool along it, False where a unit is gone."""


class Regrowth:
    """Keeps what goes, scores it beside what stays, and brings it back.

    Args:
        model: live, not sharded. sites: as planned; nothing is cut out.
        recipe: with ``regrow``. freeze: optimizer step from which on no unit returns.

    Memory: a copy of every matrix from which something went, and once more of what units that are gone read.
    Both are given up after the last decision before `freeze`.

    Raises:
        ValueError: granularity other than units, or a sharded model.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], recipe: BudgetRecipe, freeze: int) -> None:
        if recipe.granularity != "unit":
            raise ValueError(
                f"regrow={recipe.regrow!r} brings back units; with granularity={recipe.granularity!r} leave it out"
            )
        if sharded(model):
            raise ValueError(
                f"regrow={recipe.regrow!r} needs whole parameters in every process; it does not work with sharded ones "
                "(FSDP), use DistributedDataParallel or leave it out"
            )
        self.model, self.sites, self.recipe, self.freeze = model, tuple(sites), recipe, freeze
        self._keep = {site.name: np.ones(site.n_units, dtype=bool) for site in sites}
        self._stash: dict[str, torch.Tensor] = {}  # zero where a weight is live
        self._score: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def before_step(self) -> None:
        """Add up the scores of one optimizer step; called before the gradients of masked weights are zeroed."""
        for site in self.sites:
            if site.name in self._score:
                self._score[site.name] += self._gates(site).abs()

    @torch.no_grad()
    def _gates(self, site: Site) -> torch.Tensor:
        """Return (n,) float32 derivatives of the loss by a gate on each unit, on the device of its weights."""
        total = self._score[site.name].new_zeros(site.n_units)
        for piece in site.writes or site.reads:
            parameter = self.model.get_parameter(piece.param)
            if parameter.grad is None:
                continue
            weight = parameter.detach().float()
            if piece.param in self._stash:
                weight = weight + self._stash[piece.param]
            gate = (parameter.grad.float() * weight).movedim(piece.axis, 0)
            own = gate[piece.offset : piece.offset + site.n_units * piece.width]
            total += own.reshape(site.n_units, -1).sum(dim=1).to(total.device)
        return total

    def returning(self, site: Site, step: int, count: int) -> np.ndarray:
        """Return the units of a site that come back at a decision, rising.

        The best that are gone are held against the weakest that stay, pair by pair, as long as they win; at most
        `regrow_share` of those that are gone, and of input dimensions whole blocks.

        Args:
            site: as planned. step: of the decision. count: units that will stay.

        Raises:
            ValueError: scores that are not finite.
        """
        keep = self._keep[site.name]
        if step >= self.freeze or site.name not in self._score or keep.all():
            return np.zeros(0, dtype=np.int64)
        score = self._score[site.name].double().cpu().numpy()
        if not np.all(np.isfinite(score)):
            raise ValueError(f"gradients of {site.name!r} are not finite; training has diverged")
        group = self.recipe.input_group if site.kind == "input_dim" else 1
        score, kept = score.reshape(-1, group).sum(axis=1), keep.reshape(-1, group)[:, 0]
        gone, live = np.flatnonzero(~kept), np.flatnonzero(kept)
        gone = gone[np.argsort(-score[gone], kind="stable")]
        live = live[np.argsort(score[live], kind="stable")]
        most = min(int(self.recipe.regrow_share * gone.size), live.size, count // group)
        wins = score[gone[:most]] > score[live[:most]]
        back = np.sort(gone[: most if wins.all() else int(wins.argmin())])
        return np.asarray((back[:, None] * group + np.arange(group)).reshape(-1))

    def overlay(self, weights: nn.Module, site: Site, units: np.ndarray) -> nn.Module:
        """Return weights in which some units of a site that are gone have come back."""
        keep = self._keep[site.name].copy()
        keep[units] = True
        return Overlay(weights, self._restored(weights, {**self._keep, site.name: keep}))

    def settle(self, weights: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
        """Take note of a plan about to be put in force.

        Args:
            weights: of the model, before what goes is zeroed. plan: the new one.

        Returns:
            Parameter name -> tensor in which what returns has the weights it went with.
        """
        keeps = {site.name: plan.keep(site.name) for site in self.sites}
        restored = self._restored(weights, keeps)
        for param, (before, after) in self._changes(keeps).items():
            tensor = weights.get_parameter(param).detach()
            stash = self._stash.setdefault(param, torch.zeros_like(tensor, dtype=torch.float32))
            stash.copy_(torch.where(before & ~after, tensor.float(), torch.where(after, 0.0, stash)))
        self._keep = keeps
        return restored

    def watch(self, step: int, decisions: Sequence[int]) -> None:
        """Start over with the scores for the next decision; stop for good when none is left that may return units.

        Args:
            step: of the decision that was just put in force. decisions: steps of all of them.
        """
        self.close()
        if not any(step < later < self.freeze for later in decisions):
            self._stash.clear()
            self._score.clear()
            return
        self._score = {
            site.name: torch.zeros(site.n_units, device=self.model.get_parameter(site.slices[0].param).device)
            for site in self.sites
            if not self._keep[site.name].all()
        }
        self._hook()

    def close(self) -> None:
        """Remove the hooks that compute units that are gone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same scores (T7)."""
        return {
            "keep": {name: torch.from_numpy(keep.copy()) for name, keep in self._keep.items()},
            "stash": {name: tensor.clone() for name, tensor in self._stash.items()},
            "score": {name: tensor.clone() for name, tensor in self._score.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.close()
        self._keep = {name: keep.cpu().numpy().copy() for name, keep in state["keep"].items()}
        device = {name: self.model.get_parameter(name).device for name in state["stash"]}
        self._stash = {name: tensor.to(device[name], copy=True) for name, tensor in state["stash"].items()}
        home = {site.name: self.model.get_parameter(site.slices[0].param).device for site in self.sites}
        self._score = {name: tensor.to(home[name], copy=True) for name, tensor in state["score"].items()}
        if self._score:
            self._hook()

    # -- weights that come and go ----------------------------------------------------------------

    def _restored(self, weights: nn.Module, keeps: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Return parameter name -> tensor with everything back that is gone now, and would not be with `keeps`."""
        found = {}
        for param, (before, after) in self._changes(keeps).items():
            back = after & ~before
            if bool(back.any()):
                tensor = weights.get_parameter(param).detach()
                found[param] = torch.where(back, self._stash[param].to(tensor.dtype), tensor)
        return found

    def _changes(self, keeps: Mapping[str, np.ndarray]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return parameter name -> (mask now, mask with `keeps`), where they differ."""
        changed = {name for name, keep in keeps.items() if not np.array_equal(keep, self._keep[name])}
        params = {piece.param for site in self.sites if site.name in changed for piece in site.slices}
        before, after = self._vectors(self._keep), self._vectors(keeps)
        return {param: (self._mask(param, before), self._mask(param, after)) for param in sorted(params)}

    def _vectors(self, keeps: Mapping[str, np.ndarray], *, units: bool = False) -> Vectors:
        """Return what is gone, by parameter and axis; `units`: only what heads and neurons read."""
        found: Vectors = {}
        for site in self.sites:
            gone = np.flatnonzero(~keeps[site.name])
            if not gone.size or (units and not site.writes):
                continue
            for piece in site.reads if units else site.slices:
                axes = found.setdefault(piece.param, {})
                vector = axes.setdefault(piece.axis, np.ones(piece.shape[piece.axis], dtype=bool))
                vector[piece.indices(gone)] = False
        return found

    def _mask(self, param: str, vectors: Vectors) -> torch.Tensor:
        parameter = self.model.get_parameter(param)
        mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        for axis, vector in vectors.get(param, {}).items():
            shape = [-1 if dim == axis else 1 for dim in range(parameter.ndim)]
            mask &= torch.from_numpy(vector).to(parameter.device).view(shape)
        return mask

    def _hook(self) -> None:
        """Let every projection that makes units make those that are gone as well."""
        everything = self._vectors(self._keep)
        for param, axes in self._vectors(self._keep, units=True).items():
            owner, _, leaf = param.rpartition(".")
            module = self.model.get_submodule(owner)
            (axis, vector), *more = axes.items()
            assert not more, f"{param}: units on two axes"
            index = torch.from_numpy(np.flatnonzero(~vector)).to(self._stash[param].device)
            values = self._stash[param].index_select(axis, index)
            for other, keep in everything[param].items():
                if other != axis:  # input dimensions that are gone stay gone
                    shape = [-1 if dim == other else 1 for dim in range(values.ndim)]
                    values = values * torch.from_numpy(keep).to(values).view(shape)
            stand_in, stand_out = _stand_in(leaf, axis, index, values)
            self._hooks.append(module.register_forward_pre_hook(stand_in))
            self._hooks.append(module.register_forward_hook(stand_out, always_call=True))


def _stand_in(leaf: str, axis: int, index: torch.Tensor, values: torch.Tensor) -> tuple[Callable[..., None], ...]:
    """Return hooks that put values into a parameter of a module before it runs, and zeros after it."""

    # Through `.data`, which autograd does not watch. The backward pass may see zeros or values: the gradient that
    # reaches these entries is zero, since nothing reads what they make.
    def before(module: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled():
            held = getattr(module, leaf).data
            held.index_copy_(axis, index.to(held.device), values.to(held))

    def after(module: nn.Module, *_: Any) -> None:
        held = getattr(module, leaf).data
        held.index_fill_(axis, index.to(held.device), 0)

    return before, after


class Overlay(nn.Module):
    """Weights to read, some of them replaced.

    Args:
        weights: whatever has `get_parameter` and `named_parameters`. replaced: parameter name -> tensor.
    """

    replaced: Mapping[str, torch.Tensor]

    def __init__(self, weights: nn.Module, replaced: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        # Not submodules: parameters are to be found by the methods below only.
        object.__setattr__(self, "replaced", dict(replaced))
        object.__setattr__(self, "weights", weights)

    def get_parameter(self, target: str) -> Any:
        """Return a parameter, or what stands for it."""
        held: Any = self.__dict__["weights"]
        return self.replaced[target] if target in self.replaced else held.get_parameter(target)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yield all parameters, or what stands for them."""
        held: Any = self.__dict__["weights"]
        for name, parameter in held.named_parameters(*args, **kwargs):
            yield name, self.replaced.get(name, parameter)
