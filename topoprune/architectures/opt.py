"""OPT."""

from topoprune.architectures.base import Attention, Family, FeedForward

__all__ = ["OPT"]

_LAYER = "layers.{layer}"

OPT = Family(
    model_types=("opt",),
    blocks=(
        Attention(
            q=f"{_LAYER}.self_attn.q_proj",
            k=f"{_LAYER}.self_attn.k_proj",
            v=f"{_LAYER}.self_attn.v_proj",
            o=f"{_LAYER}.self_attn.out_proj",
            stack="decoder",
            attributes=(("num_heads", "heads"),),
        ),
        FeedForward(
            into=f"{_LAYER}.fc1",
            out=f"{_LAYER}.fc2",
            stack="decoder",
            width="ffn_dim",
            activation="activation_function",
        ),
    ),
)
