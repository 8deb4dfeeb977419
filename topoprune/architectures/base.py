"""What a model family declares: module paths and roles, nothing else.

A path is matched as the tail of the module names of a model, with ``{layer}`` standing for the
layer index, so one declaration serves the bare model and every task head on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Attention", "Family", "FeedForward", "Stack"]

Stack = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Attention:
    """One attention block per layer of a stack.

    Args:
        q, k, v, o: module paths of the projections. Three equal paths mean one fused projection
            whose output is [q, k, v] in that order.
        stack: which stack the block belongs to.
        block: ``"attention"`` or ``"cross_attention"`` (k and v read another stack's output).
        layers: config attribute with the number of layers.
        heads: config attribute with the number of query heads.
        kv_heads: config attribute with the number of key/value heads; None if always equal.
        head_width: config attribute with the width of a head; None, or an attribute that is
            missing or None, means hidden size / heads.
        rotary: queries and keys are rotated by position (RoPE).
        attributes: (attribute, meaning) of the module that holds q, to be set when heads are cut out: ``"heads"``
            the number of query heads, ``"width"`` heads * head width, ``"groups"`` query heads per key/value head.
        position_bias: every head reads its own column of a bias that all layers share (T5).
    """

    q: str
    k: str
    v: str
    o: str
    stack: Stack = "encoder"
    block: Literal["attention", "cross_attention"] = "attention"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_width: str | None = None
    rotary: bool = False
    attributes: tuple[tuple[str, Literal["heads", "width", "groups"]], ...] = ()
    position_bias: bool = False

    @property
    def fused(self) -> bool:
        """Whether q, k and v are parts of one module."""
        return self.q == self.k == self.v


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block per layer of a stack: plain (`into`) or gated (`gate` and `up`).

    Args:
        out: module path of the projection back to the residual stream.
        into: module path of the input projection of a plain block.
        gate, up: module paths of the two input projections of a gated block.
        stack: which stack the block belongs to.
        layers: config attribute with the number of layers.
        width: config attribute with the number of neurons; missing or None means 4 * hidden.
        activation: config attribute with the name of the activation (of the gate, in a gated block).
        when: (config attribute, value) that must hold for this declaration to apply, or None.
    """

    out: str
    into: str | None = None
    gate: str | None = None
    up: str | None = None
    stack: Stack = "encoder"
    layers: str = "num_hidden_layers"
    width: str = "intermediate_size"
    activation: str = "hidden_act"
    when: tuple[str, bool] | None = None

    def __post_init__(self) -> None:
        if (self.into is None) == (self.gate is None or self.up is None):
            raise ValueError("a feed-forward block has either `into`, or both `gate` and `up`")

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """(role, module path) of every input projection."""
        if self.into is not None:
            return (("in", self.into),)
        assert self.gate is not None and self.up is not None
        return (("gate", self.gate), ("up", self.up))


@dataclass(frozen=True)
class Family:
    """A transformer family.

    Args:
        model_types: values of ``config.model_type`` that the declaration fits.
        blocks: blocks in the order in which a layer runs them.
        hidden: config attribute with the width of the residual stream.
        transposed: weights are (in, out) as in transformers' ``Conv1D``, not (out, in) as in
            ``nn.Linear``.
        refuses: config attributes that must be false or missing, because they add blocks that
            this declaration does not describe.
    """

    model_types: tuple[str, ...]
    blocks: tuple[Attention | FeedForward, ...]
    hidden: str = "hidden_size"
    transposed: bool = False
    refuses: tuple[str, ...] = ()
