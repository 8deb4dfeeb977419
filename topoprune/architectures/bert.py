"""BERT."""

from topoprune.architectures.base import Attention, Family, FeedForward

__all__ = ["BERT"]

_LAYER = "encoder.layer.{layer}"

BERT = Family(
    model_types=("bert",),
    blocks=(
        Attention(
            q=f"{_LAYER}.attention.self.query",
            k=f"{_LAYER}.attention.self.key",
            v=f"{_LAYER}.attention.self.value",
            o=f"{_LAYER}.attention.output.dense",
            attributes=(("num_attention_heads", "heads"), ("all_head_size", "width")),
        ),
        FeedForward(into=f"{_LAYER}.intermediate.dense", out=f"{_LAYER}.output.dense"),
    ),
    refuses=("add_cross_attention",),
)
