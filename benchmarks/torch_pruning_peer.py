"""Torch-Pruning (DepGraph) on BERT: cut the very units that our plan cuts.

Its dependency graph is traced once and asked for the group of every site; what its own example for BERT fixes by hand
afterwards (the number of heads) is fixed by hand here too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from topoprune import Plan

__all__ = ["available", "prune_bert"]


def available() -> bool:
    """Return whether torch-pruning is installed (extra `bench`)."""
    return find_spec("torch_pruning") is not None


def prune_bert(model: Any, plan: Plan, example: Mapping[str, torch.Tensor]) -> Any:
    """Return a copy of a BERT from which Torch-Pruning has removed what the plan prunes.

    Args:
        model: ``BertForSequenceClassification``, dense.
        plan: at least one head and one neuron stays in each layer: the last one cannot be removed there.
        example: a batch that the graph is traced with.
    """
    import torch_pruning as tp

    small = copy.deepcopy(model).requires_grad_(True)  # it follows the graph of autograd
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every parameter that is not in a module it knows
        graph = tp.DependencyGraph().build_dependency(
            small, example_inputs=dict(example), output_transform=lambda out: out.logits.sum()
        )
        for index, layer in enumerate(small.bert.encoder.layer):
            attention = layer.attention.self
            width = attention.attention_head_size
            heads = _gone(plan, f"encoder.{index}.attention")
            features = (heads[:, None] * width + np.arange(width)).reshape(-1)
            # From the consumer backwards, as its pruner does: indices then mean the same in query, key and value.
            _cut(graph, layer.attention.output.dense, features)
            _cut(graph, layer.output.dense, _gone(plan, f"encoder.{index}.ffn"))
            attention.all_head_size = attention.query.out_features
            attention.num_attention_heads = attention.all_head_size // width
    return small.eval().requires_grad_(False)


def _gone(plan: Plan, site: str) -> np.ndarray:
    return np.flatnonzero(~plan.keep(site))


def _cut(graph: Any, consumer: Any, features: np.ndarray) -> None:
    import torch_pruning as tp

    if features.size:
        graph.get_pruning_group(consumer, tp.prune_linear_in_channels, features.tolist()).prune()
