"""Tiny randomly initialised models of every family: no network, no weight files.

`FAMILIES` maps a name to a builder ``(seed=0) -> model`` in eval mode. Weights and biases are
drawn wide enough that every unit changes the logits; the transformers initialisation (0.02, zero
biases) would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

__all__ = ["FAMILIES", "HEADS", "HIDDEN", "LAYERS", "NEURONS", "SEQ2SEQ", "build", "drawn", "inputs"]

HIDDEN, HEADS, LAYERS, NEURONS, VOCAB, POSITIONS = 24, 4, 2, 40, 64, 64
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=NEURONS,
    max_position_embeddings=POSITIONS,
)
_GQA = dict(_ENCODER, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def _t5(**extra: Any) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,  # heads * d_kv != d_model on purpose
            d_ff=NEURONS,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            **extra,
        )
    )


def _opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=NEURONS,
            max_position_embeddings=POSITIONS,
        )
    )


def _distilbert() -> nn.Module:
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=NEURONS,
            max_position_embeddings=POSITIONS,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=NEURONS,
            n_positions=POSITIONS,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _vit() -> nn.Module:
    config = {key: value for key, value in _ENCODER.items() if key not in ("vocab_size", "max_position_embeddings")}
    return ViTForImageClassification(ViTConfig(**config, image_size=8, patch_size=4))


SEQ2SEQ = dict(
    vocab_size=VOCAB,
    d_model=HIDDEN,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=NEURONS,
    decoder_ffn_dim=NEURONS,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_ENCODER)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER)),
    "distilbert": _distilbert,
    "t5": _t5,
    "t5-gated": lambda: _t5(feed_forward_proj="gated-gelu"),
    "opt": _opt,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA, head_dim=8)),
    "gpt2": _gpt2,
    "vit": _vit,
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)),
    "marian": lambda: MarianMTModel(MarianConfig(**SEQ2SEQ)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the tiny model of a family in eval mode; the same seed gives the same weights."""
    return drawn(_MODELS[name], seed)


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return what `make` builds, in eval mode, with weights and biases drawn wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim > 1:
                    parameter.copy_(0.25 * noise)
                else:
                    parameter.add_(0.1 * noise)
    return model


def _builder(name: str) -> Callable[..., nn.Module]:
    return lambda seed=0: build(name, seed)


FAMILIES: dict[str, Callable[..., nn.Module]] = {name: _builder(name) for name in _MODELS}


def inputs(model: nn.Module, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a padded batch for the model: row b has b padding tokens at its end (at least one real).

    Encoder-decoder models also get ``labels`` (length + 1 tokens, padded with -100); ViT gets images alone.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    if config.model_type == "vit":
        size = config.image_size
        return {"pixel_values": torch.randn(batch, config.num_channels, size, size, generator=generator)}

    def padded(steps: int, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(3, VOCAB, (batch, steps), generator=generator)
        mask = torch.ones(batch, steps, dtype=torch.long)
        for row in range(batch):
            mask[row, max(1, steps - row % steps) :] = 0
        return ids.masked_fill(mask == 0, filler), mask

    pad = config.pad_token_id if config.pad_token_id is not None else 0
    ids, mask = padded(length, pad)
    result = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        result["labels"] = padded(length + 1, -100)[0]
    return result
