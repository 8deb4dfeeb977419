"""ViT: an encoder over image patches; every token is real."""

from topoprune.architectures.base import Attention, Family, FeedForward

__all__ = ["VIT"]

_LAYER = "layers.{layer}"

VIT = Family(
    model_types=("vit",),
    blocks=(
        Attention(
            q=f"{_LAYER}.attention.q_proj",
            k=f"{_LAYER}.attention.k_proj",
            v=f"{_LAYER}.attention.v_proj",
            o=f"{_LAYER}.attention.o_proj",
            head_width="head_dim",
            attributes=(("num_attention_heads", "heads"),),
        ),
        FeedForward(into=f"{_LAYER}.mlp.fc1", out=f"{_LAYER}.mlp.fc2"),
    ),
)
