"""Sites: the prunable units of a model, and which tensor slices they own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Kind", "Site", "TensorSlice", "structure_digest"]

Kind = Literal["head", "kv_group", "neuron", "input_dim", "node"]


@dataclass(frozen=True)
class TensorSlice:
    """Where the units of a site lie in one parameter.

    Unit u owns the indices ``offset + u * width .. offset + (u + 1) * width - 1`` of `axis`.

    Args:
        param: qualified parameter name in the model.
        axis: the tensor axis the units lie on.
        role: ``"q" "k" "v" "o"`` (attention; ``"qkv"`` for the input dimensions of a fused
            projection), ``"in" "gate" "up" "out"`` (FFN), with ``"_bias"`` appended for biases.
        offset: first index of unit 0 (non-zero in fused projections).
        width: indices a unit owns.
        shape: full shape of the parameter.
    """

    param: str
    axis: int
    role: str
    shape: tuple[int, ...]
    offset: int = 0
    width: int = 1

    def indices(self, units: np.ndarray) -> np.ndarray:
        """Return the (len(units) * width,) int64 indices on `axis` that the units own.

        >>> TensorSlice("w", 0, "q", (8, 8), width=2).indices(np.array([0, 3]))
        array([0, 1, 6, 7])
        """
        units = np.asarray(units, dtype=np.int64)
        return (self.offset + units[:, None] * self.width + np.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class Site:
    """A set of interchangeable, prunable units in one layer.

    Args:
        name: unique within the model and the same for every head on top of it, e.g.
            ``"encoder.0.attention"``.
        kind: ``"head" | "kv_group" | "neuron" | "input_dim"``, or ``"node"`` for the nodes of a bare
            graph, which own no tensors.
        n_units: number of units.
        unit_width: features of the consumer's input one unit owns (head width, head width *
            query heads per group, or 1).
        reads: parameters that make the unit from the residual stream.
        writes: parameters that bring the unit back to the residual stream.
        consumer: module name of the projection that reads the units (None for input dimensions).
        stack: ``"encoder"`` or ``"decoder"``: which attention mask says what a real token is.
        layer: index of the layer in its stack.
        block: ``"attention" | "cross_attention" | "ffn"``.
        head_width: width of one head; 0 outside attention.
        rotary: whether queries and keys are rotated (RoPE), which breaks data-free QK comparison.
        n_groups: in how many equal runs the units lie whose tensors in `shared` serve a whole run; 0 for none.
            Query heads of grouped-query attention: one run a KV group. The same number of units must stay
            in each, since a smaller model is only right if every key/value head serves equally many query heads.
        unequal: lift that rule; compaction must then duplicate key/value heads (``duplicate_kv=True``).
        shared: tensors that all units of a run read (key and value heads); they stay, whatever is pruned.
            One run owns `width` indices, as a unit does in `reads`.
    """

    name: str
    kind: Kind
    n_units: int
    unit_width: int
    reads: tuple[TensorSlice, ...]
    writes: tuple[TensorSlice, ...] = ()
    consumer: str | None = None
    stack: Literal["encoder", "decoder"] = "encoder"
    layer: int = 0
    block: Literal["attention", "cross_attention", "ffn"] = "attention"
    head_width: int = 0
    rotary: bool = False
    n_groups: int = 0
    shared: tuple[TensorSlice, ...] = ()
    unequal: bool = False

    def __post_init__(self) -> None:
        if self.n_groups and self.n_units % self.n_groups:
            raise ValueError(f"site {self.name!r}: {self.n_units} units do not divide into {self.n_groups} groups")
        if self.shared and not self.n_groups:
            raise ValueError(f"site {self.name!r} has shared tensors, but n_groups is 0")

    @property
    def equal_groups(self) -> int:
        """In how many runs the same number of units must stay; 0 without that rule."""
        return 0 if self.unequal else self.n_groups

    @property
    def groups(self) -> np.ndarray | None:
        """(n_units,) int64, the run of each unit; None without the rule of equal counts."""
        if not self.equal_groups:
            return None
        return np.arange(self.n_units) // (self.n_units // self.n_groups)

    @property
    def tensors(self) -> tuple[TensorSlice, ...]:
        """All tensors that belong to the site: those of the units, then the shared ones."""
        return self.slices + self.shared

    @property
    def slices(self) -> tuple[TensorSlice, ...]:
        """All tensors that vanish in part with a unit: what it reads, then what it writes."""
        return self.reads + self.writes

    @property
    def parameters_per_unit(self) -> int:
        """Number of scalar parameters that vanish with one unit, biases included."""
        return sum(int(np.prod(s.shape)) // s.shape[s.axis] * s.width for s in self.slices)

    @property
    def matrix_parameters_per_unit(self) -> int:
        """As `parameters_per_unit`, weight matrices only: what sparsity is counted over."""
        return sum(int(np.prod(s.shape)) // s.shape[s.axis] * s.width for s in self.slices if len(s.shape) == 2)

    def one(self, role: str) -> TensorSlice:
        """Return the slice with a role; KeyError if the site has none."""
        for piece in self.tensors:
            if piece.role == role:
                return piece
        raise KeyError(f"site {self.name!r} has no tensor with role {role!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description; fields of grouped sites only where they are set, as files had it before."""
        fields = asdict(self)
        if not self.unequal:
            del fields["unequal"]
        return fields if self.n_groups else {k: v for k, v in fields.items() if k not in ("n_groups", "shared")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Site:
        """Rebuild a site from `to_dict` output."""
        fields = dict(data)
        for key in ("reads", "writes", "shared"):
            fields[key] = tuple(TensorSlice(**{**s, "shape": tuple(s["shape"])}) for s in fields.get(key, ()))
        return cls(**fields)


def structure_digest(sites: Iterable[Site]) -> str:
    """Return a hex digest of names, kinds and shapes; equal for equal architectures.

    Parameter names are left out, so that a plan made on a bare encoder fits the same encoder
    under a task head.
    """
    rows = sorted(
        [
            s.name,
            s.kind,
            s.n_units,
            s.unit_width,
            [[t.role, t.axis, t.offset, t.width, list(t.shape)] for t in s.tensors],
            # only where it is set: digests of files written before the field existed stay as they are
            *([s.n_groups] if s.n_groups else []),
            *(["unequal"] if s.unequal else []),
        ]
        for s in sites
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
