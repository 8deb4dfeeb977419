"""Llama, Mistral, Qwen2 and Qwen3: grouped-query attention with rotary positions, SwiGLU.

Qwen2 has q, k and v biases; Qwen3 normalises queries and keys with weights shared by all heads.
Both fall out of the same module names.
"""

from topoprune.architectures.base import Attention, Family, FeedForward

__all__ = ["LLAMA"]

_LAYER = "layers.{layer}"

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks=(
        Attention(
            q=f"{_LAYER}.self_attn.q_proj",
            k=f"{_LAYER}.self_attn.k_proj",
            v=f"{_LAYER}.self_attn.v_proj",
            o=f"{_LAYER}.self_attn.o_proj",
            stack="decoder",
            kv_heads="num_key_value_heads",
            head_width="head_dim",
            rotary=True,
            attributes=(("num_key_value_groups", "groups"),),
        ),
        FeedForward(
            gate=f"{_LAYER}.mlp.gate_proj", up=f"{_LAYER}.mlp.up_proj", out=f"{_LAYER}.mlp.down_proj", stack="decoder"
        ),
    ),
)
