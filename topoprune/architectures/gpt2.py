"""GPT-2: one fused q, k, v projection; weights are (in, out)."""

from topoprune.architectures.base import Attention, Family, FeedForward

__all__ = ["GPT2"]

_LAYER = "h.{layer}"
_FUSED = f"{_LAYER}.attn.c_attn"

GPT2 = Family(
    model_types=("gpt2",),
    blocks=(
        Attention(
            q=_FUSED,
            k=_FUSED,
            v=_FUSED,
            o=f"{_LAYER}.attn.c_proj",
            stack="decoder",
            attributes=(("num_heads", "heads"), ("split_size", "width")),
        ),
        FeedForward(
            into=f"{_LAYER}.mlp.c_fc",
            out=f"{_LAYER}.mlp.c_proj",
            stack="decoder",
            width="n_inner",
            activation="activation_function",
        ),
    ),
    transposed=True,
    refuses=("add_cross_attention",),
)
