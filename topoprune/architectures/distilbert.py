"""DistilBERT."""

from topoprune.architectures.base import Attention, Family, FeedForward

__all__ = ["DISTILBERT"]

_LAYER = "transformer.layer.{layer}"

DISTILBERT = Family(
    model_types=("distilbert",),
    blocks=(
        Attention(
            q=f"{_LAYER}.attention.q_lin",
            k=f"{_LAYER}.attention.k_lin",
            v=f"{_LAYER}.attention.v_lin",
            o=f"{_LAYER}.attention.out_lin",
            layers="n_layers",
            heads="n_heads",
            attributes=(("n_heads", "heads"),),
        ),
        FeedForward(
            into=f"{_LAYER}.ffn.lin1",
            out=f"{_LAYER}.ffn.lin2",
            layers="n_layers",
            width="hidden_dim",
            activation="activation",
        ),
    ),
    hidden="dim",
)
