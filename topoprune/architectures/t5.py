"""T5 and mT5: encoder, decoder and cross attention; plain or gated feed-forward blocks.

The relative position bias has one column per head but belongs to no site: it is computed in the
first layer and shared by all others.
"""

from topoprune.architectures.base import Attention, Family, FeedForward, Stack

__all__ = ["T5"]

_LAYERS: dict[Stack, str] = {"encoder": "num_layers", "decoder": "num_decoder_layers"}


def _attention(stack: Stack, sublayer: int, name: str) -> Attention:
    path = f"{stack}.block.{{layer}}.layer.{sublayer}.{name}"
    return Attention(
        q=f"{path}.q",
        k=f"{path}.k",
        v=f"{path}.v",
        o=f"{path}.o",
        stack=stack,
        block="attention" if name == "SelfAttention" else "cross_attention",
        layers=_LAYERS[stack],
        heads="num_heads",
        head_width="d_kv",
        attributes=(("n_heads", "heads"), ("inner_dim", "width")),
        position_bias=True,
    )


def _feed_forward(stack: Stack, sublayer: int) -> tuple[FeedForward, FeedForward]:
    path = f"{stack}.block.{{layer}}.layer.{sublayer}.DenseReluDense"
    plain = FeedForward(
        into=f"{path}.wi",
        out=f"{path}.wo",
        stack=stack,
        layers=_LAYERS[stack],
        width="d_ff",
        activation="dense_act_fn",
        when=("is_gated_act", False),
    )
    gated = FeedForward(
        gate=f"{path}.wi_0",
        up=f"{path}.wi_1",
        out=f"{path}.wo",
        stack=stack,
        layers=_LAYERS[stack],
        width="d_ff",
        activation="dense_act_fn",
        when=("is_gated_act", True),
    )
    return plain, gated


T5 = Family(
    model_types=("t5", "mt5"),
    blocks=(
        _attention("encoder", 0, "SelfAttention"),
        *_feed_forward("encoder", 1),
        _attention("decoder", 0, "SelfAttention"),
        _attention("decoder", 1, "EncDecAttention"),
        *_feed_forward("decoder", 2),
    ),
    hidden="d_model",
)
