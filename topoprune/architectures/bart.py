"""BART and Marian: encoder, decoder and cross attention with biases everywhere."""

from topoprune.architectures.base import Attention, Family, FeedForward, Stack

__all__ = ["BART"]


def _attention(stack: Stack, name: str) -> Attention:
    path = f"{stack}.layers.{{layer}}.{name}"
    return Attention(
        q=f"{path}.q_proj",
        k=f"{path}.k_proj",
        v=f"{path}.v_proj",
        o=f"{path}.out_proj",
        stack=stack,
        block="attention" if name == "self_attn" else "cross_attention",
        layers=f"{stack}_layers",
        heads=f"{stack}_attention_heads",
        attributes=(("num_heads", "heads"),),
    )


def _feed_forward(stack: Stack) -> FeedForward:
    path = f"{stack}.layers.{{layer}}"
    return FeedForward(
        into=f"{path}.fc1",
        out=f"{path}.fc2",
        stack=stack,
        layers=f"{stack}_layers",
        width=f"{stack}_ffn_dim",
        activation="activation_function",
    )


BART = Family(
    model_types=("bart", "mbart", "marian"),
    blocks=(
        _attention("encoder", "self_attn"),
        _feed_forward("encoder"),
        _attention("decoder", "self_attn"),
        _attention("decoder", "encoder_attn"),
        _feed_forward("decoder"),
    ),
    hidden="d_model",
)
