"""The four shapes of the `inference` benchmark: configs in full, plans, and natively built small models.

A native model is made from torch and transformers modules of the small sizes, without anything of topoprune: by the
stock config where it can say them (T5, Llama), else by fresh ``nn.Linear`` in a stock model (BERT, OPT).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune import Plan, find_sites
from topoprune_solvers import Solution, Status

__all__ = ["DROPPED", "SHAPES", "Counts", "Shape", "build", "inputs", "native", "plan_of"]

BATCH_LENGTH = 128
Counts = Sequence[tuple[int, int]]  # (heads, neurons) kept, layer by layer


@dataclass(frozen=True)
class Shape:
    """One model to prune.

    Args:
        key: names the figures. family: which builder. config: everything the transformers config is made from.
        layers: number of layers (T5: of each stack).
        kept: per cent removed -> (heads, neurons) every layer keeps. Heads by rounding, then the multiple of 64
            neurons (T5 at 95 %: of 16) that comes nearest to the share asked for.
    """

    key: str
    family: str
    config: Mapping[str, Any]
    layers: int
    kept: Mapping[int, tuple[int, int]]

    def counts(self, sparsity: int) -> Counts:
        """Return the uniform plan: the same counts in every layer."""
        return [self.kept[sparsity]] * self.layers


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPES = (
    Shape(
        key="bert_base",
        family="bert",
        config=dict(
            **_BASE,
            vocab_size=30522,
            intermediate_size=3072,
            hidden_act="gelu",
            max_position_embeddings=512,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
            pad_token_id=0,
        ),
        layers=12,
        kept={50: (6, 1536), 80: (2, 640), 95: (1, 128)},
    ),
    Shape(
        key="t5_small",
        family="t5",
        config=dict(
            vocab_size=32128,
            d_model=512,
            d_kv=64,
            d_ff=2048,
            num_layers=6,
            num_decoder_layers=6,
            num_heads=8,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            feed_forward_proj="relu",
            layer_norm_epsilon=1e-6,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            tie_word_embeddings=True,
        ),
        layers=6,
        kept={50: (4, 1024), 80: (2, 320), 95: (1, 16)},
    ),
    Shape(
        key="opt_125m",
        family="opt",
        config=dict(
            **_BASE,
            vocab_size=50272,
            word_embed_proj_dim=768,
            ffn_dim=3072,
            max_position_embeddings=2048,
            do_layer_norm_before=True,
            activation_function="relu",
            enable_bias=True,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        ),
        layers=12,
        kept={50: (6, 1536), 80: (2, 640), 95: (1, 128)},
    ),
    Shape(
        key="llama_160m",
        family="llama",
        config=dict(
            **_BASE,
            vocab_size=32000,
            intermediate_size=3072,
            num_key_value_heads=12,
            head_dim=64,
            hidden_act="silu",
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        layers=12,
        kept={50: (6, 1536), 80: (2, 640), 95: (1, 128)},
    ),
)

# The 12 heads and 1536 neurons that BERT-base keeps at 95 %, in two layers; nothing stays in the ten others.
DROPPED: Counts = [(6, 768) if layer in (4, 8) else (0, 0) for layer in range(12)]


def build(shape: Shape, seed: int, **changes: Any) -> Any:
    """Return a model with random weights in eval mode, without gradients, with sdpa attention.

    Args:
        shape: which. seed: of the weights. changes: config entries that differ.
    """
    import transformers

    names = {
        "bert": ("BertConfig", "BertForSequenceClassification"),
        "t5": ("T5Config", "T5ForConditionalGeneration"),
        "opt": ("OPTConfig", "OPTForCausalLM"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
    }
    config_name, model_name = names[shape.family]
    config = getattr(transformers, config_name)(**{**shape.config, **changes})
    cls = getattr(transformers, model_name)
    if cls._supports_sdpa:  # T5 since transformers 5.17; before, its attention had one form only
        config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # zero biases would hide mistakes
                    parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


def inputs(shape: Shape, batch: int, seed: int, device: str) -> dict[str, Any]:
    """Return one batch of random tokens without padding; one forward pass, no cache.

    T5 reads as many tokens in the decoder. The causal models give logits of the last position, as `generate` asks of
    them for a prompt: all of OPT's would be a third of the work and not in any site.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 30000, (batch, BATCH_LENGTH), generator=generator).to(device)
    result: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "t5":
        result |= {"decoder_input_ids": ids.flip(1), "use_cache": False}
    elif shape.family != "bert":
        result |= {"logits_to_keep": 1, "use_cache": False}
    return result


def plan_of(model: nn.Module, counts: Counts, seed: int) -> Plan:
    """Return a plan that keeps these counts in each layer, of units drawn at random."""
    rng = np.random.default_rng(seed)
    sites = find_sites(model, include=("heads", "neurons"))
    solutions = {}
    for site in sites:
        keep = np.zeros(site.n_units, dtype=bool)
        kept = counts[site.layer][site.kind == "neuron"]
        keep[rng.choice(site.n_units, kept, replace=False)] = True
        solutions[site.name] = Solution(keep, float(kept), "min", Status.FEASIBLE, "random")
    return Plan(sites, solutions)


def native(shape: Shape, counts: Counts, dense: Any, seed: int) -> Any:
    """Return a model of these sizes built directly; zero heads or neurons in BERT only.

    Args:
        shape: which. counts: sizes of every layer. dense: what the parts that are not pruned are copied from, where
            the stock config cannot say the sizes. seed: of new weights.
    """
    if shape.family in ("t5", "llama"):
        (heads, neurons), *others = dict.fromkeys(counts)
        if others:
            raise ValueError(f"a stock {shape.family} config says one size for all layers, not {counts}")
        names = {"t5": ("num_heads", "d_ff"), "llama": ("num_attention_heads", "intermediate_size")}[shape.family]
        changes = dict(zip(names, (heads, neurons), strict=True))
        if shape.family == "llama":
            changes["num_key_value_heads"] = heads
        return build(shape, seed, **changes)
    model = copy.deepcopy(dense)
    make = _native_bert if shape.family == "bert" else _native_opt
    layers = model.bert.encoder.layer if shape.family == "bert" else model.model.decoder.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer, (heads, neurons) in zip(layers, counts, strict=True):
            make(layer, heads, neurons)
    return model.eval().requires_grad_(False)


def _native_bert(layer: Any, heads: int, neurons: int) -> None:
    attention, width = layer.attention.self, layer.attention.self.query.in_features
    inner = heads * attention.attention_head_size
    if heads:
        attention.query, attention.key, attention.value = (nn.Linear(width, inner) for _ in range(3))
        layer.attention.output.dense = nn.Linear(inner, width)
        attention.num_attention_heads, attention.all_head_size = heads, inner
    else:
        layer.attention = _BareAttention(layer.attention.output)
    if neurons:
        layer.intermediate.dense, layer.output.dense = nn.Linear(width, neurons), nn.Linear(neurons, width)
    else:
        layer.intermediate, layer.output = nn.Identity(), _BareOutput(layer.output)


class _BareOutput(nn.Module):
    """What is left of a BERT sublayer without units: the output bias and the LayerNorm."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.bias, self.LayerNorm = output.dense.bias, output.LayerNorm

    def forward(self, _: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.LayerNorm(residual + self.bias)
        return result


class _BareAttention(nn.Module):
    """A BERT attention block without heads."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = _BareOutput(output)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.output(hidden, hidden), None


def _native_opt(layer: Any, heads: int, neurons: int) -> None:
    attention, width = layer.self_attn, layer.embed_dim
    inner = heads * attention.head_dim
    attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(width, inner) for _ in range(3))
    attention.out_proj = nn.Linear(inner, width)
    attention.num_heads = heads
    layer.fc1, layer.fc2 = nn.Linear(width, neurons), nn.Linear(neurons, width)
