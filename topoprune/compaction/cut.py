"""From a plan to a cut: which indices of which tensors stay, and which modules change with them.

Nothing is edited here, so everything that can be refused is refused before (T9).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from topoprune.architectures import FAMILIES, Attention, find_sites, model_config
from topoprune.compaction.layout import bits_of, empty_layout, layout_of, relative_name, units_of
from topoprune.graph import Site, TensorSlice
from topoprune.planning import Plan

__all__ = ["Cut", "Gather", "make_cut", "padded"]

Gather = Literal["auto", "always", "never"]
_PROBE_TOKENS = 1024  # rows of the product that decides whether a gather pays
_WORTH = 0.95  # a gather that saves less than a twentieth is not worth another module


@dataclass
class Cut:
    """What compaction does to a model; nothing of it is done yet.

    Args:
        keep: parameter -> {axis: (k,) int64 indices that stay, in order; repeated where copied}.
        zero: parameter -> {axis: (z,) int64 indices, old numbering, set to zero before the cut}.
        edges: parameter -> bool array of its shape, True where a weight stays.
        values: parameter -> tensor to write before everything else (folded biases).
        attributes: module -> {attribute: value}.
        patches: module -> name in `modeling_topoprune.PATCHES`.
        buffers: module -> {buffer: (n,) int64}.
        sites: site -> entry of the layout.
        left: input-dimension sites whose zeros stay in the weights.
    """

    keep: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    zero: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    edges: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    patches: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def touched(self) -> set[str]:
        """Names of the parameters that change."""
        return set(self.keep) | set(self.zero) | set(self.edges) | set(self.values)

    def tensor(self, name: str, tensor: torch.Tensor, *, data: bool = True) -> torch.Tensor:
        """Return what becomes of a parameter, or of anything that lies entry by entry beside it.

        Args:
            name: the parameter. tensor: of its shape.
            data: False for gradients and optimizer state: folded values are not written there.
        """
        written = self.values[name].to(tensor) if data and name in self.values else tensor
        result = written
        for axis, gone in self.zero.get(name, {}).items():
            result = result.index_fill(axis, torch.from_numpy(gone).to(result.device), 0)
        if name in self.edges:
            result = result.masked_fill(torch.from_numpy(~self.edges[name]).to(result.device), 0)
        for axis, kept in self.keep.get(name, {}).items():
            result = result.index_select(axis, torch.from_numpy(kept).to(result.device))
        # A tensor of its own: a view would keep the dense one alive.
        return result.clone() if result is written else result.contiguous()

    def layout(self, model: nn.Module) -> dict[str, Any]:
        """Return ``config.topoprune`` after this cut, earlier cuts of the model included."""
        earlier = layout_of(model)
        layout = {
            key: dict(value) if isinstance(value, Mapping) else value
            for key, value in (earlier or empty_layout()).items()
        }
        layout["sites"] |= self.sites
        for name, axes in self.keep.items():
            shape = list(model.get_parameter(name).shape)
            for axis, kept in axes.items():
                shape[axis] = int(kept.size)
            layout["parameters"][relative_name(model, name)] = shape
        for name, values in self.attributes.items():
            layout["attributes"][relative_name(model, name)] = dict(values)
        for name, patch in self.patches.items():
            layout["patches"][relative_name(model, name)] = patch
        for name, buffers in self.buffers.items():
            layout["buffers"][relative_name(model, name)] = {key: int(value.size) for key, value in buffers.items()}
        return layout


def padded(site: Site, keep: np.ndarray, rounding: int | None) -> np.ndarray:
    """Return (n,) bool: the kept units and, up to a multiple of `rounding` features, pruned ones kept as zeros.

    Where groups keep equally many units they are padded equally, and groups that keep none stay empty; no unit
    stays where none is kept. The whole site stays where no smaller number is such a multiple.

    Example:
        >>> site = Site("ffn", "neuron", 12, 1, ())
        >>> padded(site, np.arange(12) > 6, 8).astype(int)
        array([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """
    stays = np.array(keep, dtype=bool)
    if rounding is None or not stays.any():
        return stays
    rows = stays.reshape(site.n_groups or 1, -1)  # a view
    counts = rows.sum(axis=1)
    live = np.flatnonzero(counts)
    if np.unique(counts[live]).size > 1:  # unequal query heads: key/value heads get copies, whatever the counts
        rows, live, counts = stays.reshape(1, -1), np.arange(1), np.array([counts.sum()])
    size = rows.shape[1]
    sizes = (c for c in range(int(counts[live[0]]), size + 1) if c * live.size * site.unit_width % rounding == 0)
    target = next(sizes, None)
    if target is None:
        stays[:] = True
        return stays
    for row in live:
        rows[row, np.flatnonzero(~rows[row])[: target - int(counts[row])]] = True
    return stays


def make_cut(
    model: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    *,
    edges: Mapping[str, np.ndarray] | None = None,
    rounding: int | None = None,
    gather: Gather = "auto",
    duplicate_kv: bool = False,
) -> Cut:
    """Work out everything that compaction changes.

    Args:
        model: holds the weights. sites: the planned sites with this model's names. plan: what stays.
        edges: parameter -> bool array of its shape, True where a weight edge stays.
        rounding, gather, duplicate_kv: see `topoprune.compact`.

    Raises:
        ValueError: heads of a family without compaction rules, unequal query heads without `duplicate_kv`.

    Complexity: O(parameters of the pruned sites); with gathers, a few matrix products each.
    """
    cut = Cut(edges=dict(edges or {}))
    by_name = {site.name: site for site in sites}
    decided = [(by_name[name], solution.keep) for name, solution in plan.unit_solutions().items()]
    heads_cut = False
    for site, keep in decided:
        if site.kind == "input_dim" or bool(np.all(keep)):
            continue
        stays = padded(site, keep, rounding)
        _mark_zero(cut, site, stays & ~keep)
        if stays.all():
            continue
        for piece in site.slices:
            _drop(cut, piece.param, piece.axis, piece.shape, piece.indices(np.flatnonzero(~stays)))
        if site.kind == "neuron":
            _cut_neurons(cut, model, site, stays)
        else:
            heads_cut = True
            _cut_heads(cut, model, site, stays, duplicate_kv)
    if heads_cut:
        _share_position_bias(cut, model)
    for site, keep in decided:
        if site.kind == "input_dim" and not bool(np.all(keep)):
            _cut_inputs(cut, model, site, padded(site, keep, rounding), np.asarray(keep), gather)
    return cut


def _drop(cut: Cut, param: str, axis: int, shape: tuple[int, ...], gone: np.ndarray) -> None:
    axes = cut.keep.setdefault(param, {})
    kept = axes.get(axis, np.arange(shape[axis]))
    axes[axis] = kept[~np.isin(kept, gone)]


def _mark_zero(cut: Cut, site: Site, units: np.ndarray) -> None:
    which = np.flatnonzero(units)
    if which.size == 0:
        return
    for piece in site.slices:
        axes = cut.zero.setdefault(piece.param, {})
        axes[piece.axis] = np.union1d(axes.get(piece.axis, np.zeros(0, dtype=np.int64)), piece.indices(which))


def _entry(model: nn.Module, name: str, stays: np.ndarray, **sizes: int) -> dict[str, Any]:
    """Return a site's layout entry, in units of the dense model."""
    earlier = (layout_of(model) or empty_layout())["sites"].get(name)
    if earlier is not None:
        dense = np.zeros(earlier["of"], dtype=bool)
        dense[np.flatnonzero(units_of(earlier))[stays]] = True
        stays = dense
    return {"kept": int(stays.sum()), "of": int(stays.size), **sizes, "units": bits_of(stays)}


def _cut_neurons(cut: Cut, model: nn.Module, site: Site, stays: np.ndarray) -> None:
    cut.sites[site.name] = _entry(model, site.name, stays)
    if not stays.any() and site.consumer is not None:
        cut.patches[site.consumer] = "no-inputs"


def _attention_of(model: nn.Module, site: Site) -> Attention:
    family = FAMILIES.get(getattr(model_config(model), "model_type", None) or "")
    blocks = () if family is None else family.blocks
    for block in blocks:
        if isinstance(block, Attention) and (block.stack, block.block) == (site.stack, site.block):
            return block
    known = ", ".join(sorted(FAMILIES))
    raise ValueError(
        f"compact has no rules for the attention of {site.name!r} in a {type(model).__name__}: which attributes say "
        f"its number of heads is known for {known}. Neurons can be removed; describe the family with register_family"
    )


def _cut_heads(cut: Cut, model: nn.Module, site: Site, stays: np.ndarray, duplicate_kv: bool) -> None:
    block = _attention_of(model, site)
    per_unit = site.unit_width // site.head_width
    heads = int(stays.sum()) * per_unit
    kv_heads = int(stays.sum())
    if site.n_groups:
        copies = _kv_copies(site, stays, duplicate_kv)
        kv_heads = int(copies.size)
        if not np.array_equal(copies, np.arange(site.n_groups)):
            for piece in site.shared:
                cut.keep.setdefault(piece.param, {})[piece.axis] = piece.indices(copies)
    module = site.one("q").param.rsplit(".", 2)[0]
    values = {"heads": heads, "width": heads * site.head_width, "groups": heads // kv_heads if kv_heads else 1}
    cut.attributes[module] = {name: values[meaning] for name, meaning in block.attributes}
    cut.sites[site.name] = _entry(model, site.name, np.repeat(stays, per_unit), heads=heads, kv_heads=kv_heads)
    if heads == 0:
        cut.patches[site.consumer or ""] = "no-inputs"
        cut.patches[module] = "no-heads"
    if block.position_bias:
        cut.patches[module] = "bias-of-kept-heads"
        cut.buffers[module] = {"kept_heads": _buffer(model, module, "kept_heads", site.n_units)[stays]}


def _kv_copies(site: Site, stays: np.ndarray, duplicate: bool) -> np.ndarray:
    """Return (kv heads,) int64: which key/value head each new one is, in order."""
    counts = stays.reshape(site.n_groups, -1).sum(axis=1)
    live = np.flatnonzero(counts)
    if np.unique(counts[live]).size <= 1:
        return live  # groups that lost all of their query heads leave with their key/value heads
    if not duplicate:
        raise ValueError(
            f"the plan of {site.name!r} keeps {counts.tolist()} query heads in its KV groups: unequal counts would "
            "run silently wrong. Pass duplicate_kv=True (key/value heads get as many copies as it takes, the function "
            "stays the same), or plan with gqa='groups' or gqa='query-heads'"
        )
    # One copy serves as many query heads as the greatest common divisor of the counts allows.
    return np.repeat(np.arange(site.n_groups), counts // math.gcd(*counts.tolist()))


def _buffer(model: nn.Module, module: str, name: str, size: int) -> np.ndarray:
    """Return what an index buffer holds now; the identity where there is none yet."""
    buffer = getattr(model.get_submodule(module), name, None)
    return np.arange(size) if buffer is None else buffer.cpu().numpy()


def _share_position_bias(cut: Cut, model: nn.Module) -> None:
    """Patch the untouched attentions too where a position bias passes from layer to layer."""
    for site in find_sites(model, include=("heads",)):
        block = _attention_of(model, site)
        module = site.one("q").param.rsplit(".", 2)[0]
        if block.position_bias and module not in cut.patches:
            cut.patches[module] = "bias-of-kept-heads"
            cut.buffers[module] = {"kept_heads": _buffer(model, module, "kept_heads", site.n_units)}


def _cut_inputs(cut: Cut, model: nn.Module, site: Site, stays: np.ndarray, keep: np.ndarray, gather: Gather) -> None:
    modules = {piece.param.rsplit(".", 1)[0]: piece for piece in site.reads}
    outputs = {piece.param: _kept(cut, piece, 1 - piece.axis) for piece in site.reads}
    if all(kept.size == 0 for kept in outputs.values()):
        return  # no heads stay, so nothing reads these inputs
    if not stays.any():
        stays[0] = True  # as a zero: a projection without inputs is a special case wherever it is read
    use = gather == "always" or (
        gather == "auto"
        and all(_gather_pays(model.get_submodule(m), p.axis, stays, outputs[p.param]) for m, p in modules.items())
    )
    if not use:
        _mark_zero(cut, site, ~keep)
        cut.left.append(site.name)
        return
    _mark_zero(cut, site, stays & ~keep)
    if stays.all():
        return
    for module, piece in modules.items():
        _check_projection(model.get_submodule(module), module, site)
        _drop(cut, piece.param, piece.axis, piece.shape, piece.indices(np.flatnonzero(~stays)))
        cut.patches[module] = "gathered-inputs"
        cut.buffers[module] = {"kept_inputs": _buffer(model, module, "kept_inputs", site.n_units)[stays]}
    cut.sites[site.name] = _entry(model, site.name, stays)


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__.endswith("Conv1D")


def _check_projection(module: nn.Module, name: str, site: Site) -> None:
    if not _is_projection(module):
        raise ValueError(
            f"a gather of the inputs of {site.name!r} needs nn.Linear or Conv1D, {name!r} is a "
            f"{type(module).__name__}; use gather='never', which leaves zeros"
        )


def _kept(cut: Cut, piece: TensorSlice, axis: int) -> np.ndarray:
    """Return which indices of an axis of a parameter stay."""
    return cut.keep.get(piece.param, {}).get(axis, np.arange(piece.shape[axis]))


@torch.no_grad()
def _gather_pays(module: nn.Module, axis: int, stays: np.ndarray, outputs: np.ndarray) -> bool:
    """Time the projection to the outputs that stay, from all inputs and behind a gather, where it runs."""
    if not _is_projection(module):
        return False  # no place to put it
    weight: Any = module.weight
    index = torch.from_numpy(np.flatnonzero(stays)).to(weight.device)
    used = weight.detach().index_select(1 - axis, torch.from_numpy(outputs).to(weight.device))
    matrix = used if axis == 0 else used.t()
    small = matrix.index_select(0, index)
    hidden = torch.zeros((_PROBE_TOKENS, matrix.shape[0]), dtype=weight.dtype, device=weight.device)

    def seconds(gathered: bool) -> float:
        best = math.inf
        for _ in range(6):
            if weight.device.type == "cuda":
                torch.cuda.synchronize(weight.device)
            started = time.perf_counter()
            hidden.index_select(-1, index) @ small if gathered else hidden @ matrix
            if weight.device.type == "cuda":
                torch.cuda.synchronize(weight.device)
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(True) < _WORTH * seconds(False)
