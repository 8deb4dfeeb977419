"""Write a plan into a live model as zeros, keep them zero in training, and take it back bit for bit.

Rules of docs/design/0001-graph-ir.md pinned here: T1 (masked weights are exactly zero after every
optimizer step), T2 (their gradients are zero before it, newly masked optimizer state is cleared)
and T9 (all checks come before any edit).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import FAMILIES, check_sites, find_sites
from topoprune.architectures.find import compacted_sites
from topoprune.extraction.gram import collect_gram
from topoprune.extraction.tensors import weights_digest
from topoprune.graph import Site, structure_digest
from topoprune.planning import Plan
from topoprune.repair import Merge, merged_weights
from topoprune.sharding import local, local_part, weights_of, write

__all__ = [
    "MaskHandle",
    "apply",
    "check_edges",
    "check_finite_sites",
    "check_optimizer",
    "edge_masks",
    "fit_sites",
    "open_handle",
    "unwrap",
]

_MASKED: weakref.WeakKeyDictionary[nn.Module, MaskHandle] = weakref.WeakKeyDictionary()
_INCLUDE = {"head": "heads", "kv_group": "heads", "neuron": "neurons", "input_dim": "input_dims"}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel or DistributedDataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the optimizer trains none of the model's parameters."""
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer has none of this model's parameters; build it from model.parameters()")


def open_handle(model: nn.Module) -> MaskHandle | None:
    """Return the handle in force on a model, if any."""
    return _MASKED.get(unwrap(model))


def _family_known(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) in FAMILIES


def fit_sites(model: nn.Module, planned: Sequence[Site]) -> tuple[Site, ...]:
    """Return the planned sites with the parameter names of this model.

    Raises:
        ValueError: the model lacks a site or has another shape; names the first difference.
    """
    bare = [site.name for site in planned if site.kind == "node"]
    if bare:
        raise ValueError(f"this plan decides on the nodes of a bare graph ({bare[0]!r}), not on units of a model")
    if not _family_known(model):
        check_sites(model, planned)
        return tuple(planned)
    model_type = getattr(model.config, "model_type", None)
    include = tuple(dict.fromkeys(_INCLUDE[site.kind] for site in planned))
    found = {site.name: site for site in find_sites(model, include=include, gqa=_gqa(planned))}
    for site in planned:
        here = found.get(site.name)
        if here is not None and structure_digest([here]) == structure_digest([site]):
            continue
        if compacted_sites(model):
            left = "nothing is left of it" if here is None else f"it has {here.n_units} {here.kind} units"
            raise ValueError(
                f"this model was compacted already: the plan decides on {site.n_units} {site.kind} units of site "
                f"{site.name!r}, here {left}. Extract and solve again to prune the compacted model further"
            )
        if here is None:
            raise ValueError(
                f"this plan is of another model: it has site {site.name!r}, this {model_type} model does not"
            )
        raise ValueError(
            f"this plan is of another model: site {site.name!r} has {site.n_units} {site.kind} units of width "
            f"{site.unit_width} there, {here.n_units} {here.kind} units of width {here.unit_width} here "
            f"(tensors {[s.shape for s in site.slices][:3]} against {[s.shape for s in here.slices][:3]})"
        )
    return tuple(found[site.name] for site in planned)


def _gqa(planned: Iterable[Site]) -> str:
    grouped = [site for site in planned if site.n_groups]
    if any(site.unequal for site in grouped):
        return "any-query-heads"
    return "query-heads" if grouped else "groups"


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    merge: Merge = "none",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    ridge: float = 0.0,
    allow_changed_weights: bool = False,
) -> MaskHandle:
    """Zero what the plan prunes in the live model; `close` (or leaving the block) restores it bit for bit.

    Args:
        model: the model the plan was made for, or the same body under another head.
        plan: from `solve`.
        merge: how survivors take over, see `topoprune.repair`.
        calibration: batches (dicts of tensors) for ``scale`` and ``least-squares``.
        ridge: ridge of ``least-squares``, relative to the mean of the moment's diagonal.
        allow_changed_weights: accept a plan made from other weight values of the same architecture.

    Returns:
        A `MaskHandle`, usable as a context manager; `attach` it to an optimizer to train.

    Raises:
        ValueError: a plan of another model or of other weights, a model that is already
            masked, non-finite weights, a merge without calibration data. The model is untouched.
    """
    model = unwrap(model)
    if open_handle(model) is not None:
        raise ValueError("this model is already pruned by an open MaskHandle; close() it or use its refresh(plan)")
    sites = fit_sites(model, plan.sites)
    check_edges(model, sites, plan)
    if plan.weights_digest and not allow_changed_weights and weights_digest(model, sites) != plan.weights_digest:
        raise ValueError(
            "the model's weights have changed since the plan was made; extract and solve again, "
            "or pass allow_changed_weights=True"
        )
    check_finite_sites(model, sites, plan)
    moments: Mapping[str, torch.Tensor] = {}
    if merge in ("scale", "least-squares"):
        if calibration is None:
            raise ValueError(f"merge {merge!r} needs calibration=[batch, ...] (dicts of model inputs)")
        pruned = [s for s in sites if s.consumer and s.name in plan.solutions and not plan.keep(s.name).all()]
        moments = dict(collect_gram(model, pruned, calibration))
    # The paper's merge writes into the FFN behind a layer's heads, which a plan on heads alone does not name.
    around = find_sites(model, gqa=_gqa(sites)) if merge == "paper" and _family_known(model) else sites
    changed = merged_weights(weights_of(model), around, plan, merge, moments, ridge=ridge)
    return MaskHandle(model, plan, sites=sites, changed=changed)


def _renaming(plan: Plan, sites: Sequence[Site]) -> dict[str, str]:
    """Map parameter names of the planned model to names of the model whose sites are given."""
    here = {site.name: site for site in sites}
    return {
        old.param: new.param
        for planned in plan.sites
        for old, new in zip(planned.tensors, here[planned.name].tensors, strict=True)
    }


def edge_masks(sites: Sequence[Site], plan: Plan) -> dict[str, np.ndarray]:
    """Return parameter name (of the model whose sites are given) -> bool array, True where an edge stays."""
    renamed, masks = _renaming(plan, sites), {}
    for name, (axis, shape) in plan.edge_axes.items():
        keep = plan.solutions[name].keep.reshape(shape)
        masks[renamed.get(name, name)] = np.ascontiguousarray(keep if axis == 0 else keep.T)
    return masks


def check_edges(model: nn.Module, sites: Sequence[Site], plan: Plan) -> None:
    """Raise ValueError unless every parameter whose edges the plan masks is there with its shape."""
    renamed, params = _renaming(plan, sites), dict(model.named_parameters())
    for name, (axis, shape) in plan.edge_axes.items():
        parameter = params.get(renamed.get(name, name))
        expected = shape if axis == 0 else shape[::-1]
        if parameter is None or tuple(parameter.shape) != tuple(expected):
            found = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            raise ValueError(
                f"this plan is of another model: it masks edges of {name!r} with shape {expected}, "
                f"there is {found} here"
            )


def check_finite_sites(model: nn.Module, sites: Sequence[Site], plan: Plan) -> None:
    """Raise ValueError, with the name of the tensor, if anything the plan decides on is not finite."""
    decided, renamed = set(plan.solutions), _renaming(plan, sites)
    names = {piece.param for site in sites if site.name in decided for piece in site.slices}
    names |= {renamed.get(name, name) for name in plan.edge_axes}
    params = dict(model.named_parameters())
    for name in sorted(names):
        if not torch.isfinite(params[name]).all():
            raise ValueError(f"parameter {name!r} has non-finite values; fix or reload the model before pruning")


class MaskHandle:
    """The zeros of a plan on a live model.

    Args:
        model: an unwrapped module. plan: the plan. sites: its sites with this model's names.
        changed: parameters to overwrite first (from a merge). stash: keep the original values
            for `close`; without it `close` leaves zeros.

    Use `apply` to make one with all checks.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        sites: Sequence[Site] | None = None,
        changed: Mapping[str, torch.Tensor] | None = None,
        stash: bool = True,
    ) -> None:
        self._model = weakref.ref(unwrap(model))  # weak: the registry below must not keep a forgotten model alive
        self.sites = tuple(fit_sites(self.model, plan.sites) if sites is None else sites)
        self._stash: dict[str, torch.Tensor] | None = {} if stash else None
        self._hooks: list[Any] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        masks = self._build(plan)
        self.plan = plan
        self._masks = masks
        if stash:
            for name in sorted(set(masks) | set(changed or {})):
                self._stash_one(name)
        with torch.no_grad():
            for name, tensor in (changed or {}).items():
                write(self.model.get_parameter(name), tensor)
        self.enforce()
        _MASKED[self.model] = self

    def _build(self, plan: Plan) -> dict[str, list[torch.Tensor]]:
        """Return parameter name -> masks broadcastable to it, 1 where a weight stays."""
        vectors: dict[tuple[str, int], np.ndarray] = {}
        params = dict(self.model.named_parameters())
        by_name = {site.name: site for site in self.sites}
        for name, solution in plan.unit_solutions().items():
            gone = np.flatnonzero(~solution.keep)
            if gone.size == 0:
                continue
            for piece in by_name[name].slices:
                key = piece.param, piece.axis
                vector = vectors.setdefault(key, np.ones(piece.shape[piece.axis], dtype=bool))
                vector[piece.indices(gone)] = False
        masks: dict[str, list[torch.Tensor]] = {}
        for (param, axis), vector in vectors.items():
            tensor = params[param]
            broadcast = [-1 if dim == axis else 1 for dim in range(tensor.ndim)]
            masks.setdefault(param, []).append(local_part(_as_mask(vector, tensor).view(broadcast), tensor))
        for param, keep in edge_masks(self.sites, plan).items():
            masks.setdefault(param, []).append(local_part(_as_mask(keep, params[param]), params[param]))
        return masks

    def _stash_one(self, name: str) -> None:
        assert self._stash is not None
        if name not in self._stash:
            self._stash[name] = self.model.get_parameter(name).detach().clone()

    @property
    def model(self) -> nn.Module:
        """The masked model; ValueError once it no longer exists."""
        model = self._model()
        if model is None:
            raise ValueError("the model of this MaskHandle no longer exists; keep a reference to it")
        return model

    @property
    def closed(self) -> bool:
        """True after `close`, and when the model no longer exists."""
        model = self._model()
        return model is None or _MASKED.get(model) is not self

    def masks(self) -> dict[str, torch.Tensor]:
        """Return parameter name -> bool tensor of its shape (of this rank's part), True where a weight stays."""
        params = dict(self.model.named_parameters())
        full = {}
        for name, parts in self._masks.items():
            keep = torch.ones_like(local(params[name]), dtype=torch.bool)
            for part in parts:
                keep &= part.to(keep.device) != 0
            full[name] = keep
        return full

    @torch.no_grad()
    def enforce(self) -> None:
        """Set every masked weight to zero (T1). O(size of the masked tensors)."""
        for parameter, parts in self._pairs():
            for part in parts:
                local(parameter).mul_(part)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero (T2)."""
        for parameter, parts in self._pairs():
            if parameter.grad is not None:
                for part in parts:
                    local(parameter.grad).mul_(part)

    @torch.no_grad()
    def clear_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Set optimizer state of masked weights to zero (momenta and second moments of their shape)."""
        for parameter, parts in self._pairs():
            for value in optimizer.state.get(parameter, {}).values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    for part in parts:
                        local(value).mul_(part.to(local(value)))

    def _pairs(self) -> Iterable[tuple[nn.Parameter, list[torch.Tensor]]]:
        for name, parts in self._masks.items():
            parameter = self.model.get_parameter(name)
            if parts and (parts[0].device != parameter.device or not _mask_dtype_fits(parts[0], parameter)):
                parts[:] = [_as_mask((part != 0).cpu().numpy(), parameter) for part in parts]
            yield parameter, parts

    def attach(self, optimizer: torch.optim.Optimizer) -> MaskHandle:
        """Keep the masks through training with this optimizer (T1, T2); returns the handle.

        Raises:
            ValueError: a closed handle, an optimizer attached already, or one that trains none of
                the model's parameters.
        """
        self._require_open()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        if any(optimizer is known for known in self._optimizers):
            raise ValueError("this optimizer is attached to the handle already")
        check_optimizer(self.model, optimizer)
        self.clear_optimizer_state(optimizer)
        self._optimizers.append(optimizer)
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self.mask_gradients()))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.enforce()))
        return self

    def refresh(self, plan: Plan) -> None:
        """Replace the plan.

        Without an attached optimizer everything returns to its original value first (a merge is
        undone with its plan). In training, survivors keep what they have learned, and only
        entries that are no longer masked return from the stash. New masks go to zero.

        Raises:
            ValueError: a plan of another model; nothing is changed then.
        """
        self._require_open()
        check_edges(self.model, fit_sites(self.model, plan.sites), plan)
        if structure_digest(plan.sites) != structure_digest(self.sites):
            raise ValueError("refresh(plan) needs a plan over the same sites as the one in force")
        masks = self._build(plan)
        kept_before = self.masks() if self._stash is not None and self._optimizers else {}
        self.plan, self._masks = plan, masks
        if self._stash is not None:
            if self._optimizers:
                self._return_unmasked(kept_before)
            else:
                self._restore()
            for name in masks:
                self._stash_one(name)
        self.enforce()
        for optimizer in self._optimizers:
            self.clear_optimizer_state(optimizer)

    @torch.no_grad()
    def _return_unmasked(self, kept_before: Mapping[str, torch.Tensor]) -> None:
        """Bring back from the stash what was masked until now and is masked no longer."""
        assert self._stash is not None
        kept_now = self.masks()
        for name, keep in kept_before.items():
            back = ~keep & kept_now.get(name, torch.ones_like(keep))
            parameter = local(self.model.get_parameter(name))
            parameter.copy_(torch.where(back, local(self._stash[name]).to(parameter.device), parameter))

    @torch.no_grad()
    def _restore(self) -> None:
        assert self._stash is not None
        for name, tensor in self._stash.items():
            self.model.get_parameter(name).copy_(tensor)

    def close(self, *, restore: bool = True) -> None:
        """Release the model. With `restore` the original values of all touched tensors return bit
        for bit (this undoes training done under the handle too; pass ``restore=False`` to keep it).
        """
        if self.closed:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if restore and self._stash is not None:
            self._restore()
        del _MASKED[self.model]

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("this MaskHandle is closed; apply the plan again")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return site (or parameter) name -> (n,) bool keep mask: what is needed to resume."""
        return {name: torch.from_numpy(s.keep.copy()) for name, s in self.plan.solutions.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the masks of `state_dict` in force.

        Raises:
            ValueError: names or sizes that differ from the plan in force.
        """
        if set(state) != set(self.plan.solutions):
            raise ValueError(f"state names {sorted(state)[:5]}, the plan {sorted(self.plan.solutions)[:5]}")
        solutions = {}
        for name, keep in state.items():
            here = self.plan.solutions[name]
            if tuple(keep.shape) != here.keep.shape:
                raise ValueError(f"state of {name!r} has {tuple(keep.shape)} entries, expected {here.keep.shape}")
            array = keep.cpu().numpy().astype(bool)
            solutions[name] = (
                here
                if np.array_equal(array, here.keep)
                else replace(here, keep=array, dominator=None, dominator_distance=None, bound=None)
            )
        changed = {name for name, solution in solutions.items() if solution is not self.plan.solutions[name]}
        joint = tuple(known for known in self.plan.joint if not changed.intersection(known.sites))
        self.refresh(replace(self.plan, solutions=solutions, joint=joint))

    def __enter__(self) -> MaskHandle:
        self._require_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"MaskHandle({state}, {len(self._masks)} tensors masked, {self.plan!r})"


def _as_mask(keep: np.ndarray, parameter: torch.Tensor) -> torch.Tensor:
    """Return a mask to multiply with: the parameter's dtype on CPU (bool products are 6x slower
    there), bool on accelerators (an eighth to a quarter of the memory)."""
    mask = torch.from_numpy(np.array(keep, order="C"))
    if parameter.device.type == "cpu":
        return mask.to(parameter.dtype)
    return mask.to(parameter.device)


def _mask_dtype_fits(mask: torch.Tensor, parameter: torch.Tensor) -> bool:
    return mask.dtype == (parameter.dtype if parameter.device.type == "cpu" else torch.bool)
