"""Model families: which modules hold the heads, the neurons and the input dimensions.

To add one, write a file with a `Family` and list it here, or call `register_family`.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from topoprune.architectures.bart import BART
from topoprune.architectures.base import Attention, Family, FeedForward
from topoprune.architectures.bert import BERT
from topoprune.architectures.checks import check_plain, check_sites, counted_matrices, matrix_parameters
from topoprune.architectures.distilbert import DISTILBERT
from topoprune.architectures.find import INCLUDES, model_config, sites_of_family
from topoprune.architectures.gpt2 import GPT2
from topoprune.architectures.llama import LLAMA
from topoprune.architectures.opt import OPT
from topoprune.architectures.roberta import ROBERTA
from topoprune.architectures.t5 import T5
from topoprune.architectures.vit import VIT
from topoprune.graph import Site

__all__ = [
    "FAMILIES",
    "GQA",
    "Attention",
    "Family",
    "FeedForward",
    "check_sites",
    "counted_matrices",
    "find_sites",
    "matrix_parameters",
    "model_config",
    "register_family",
]

FAMILIES: dict[str, Family] = {}
GQA = ("groups", "query-heads", "any-query-heads")


def register_family(family: Family) -> Family:
    """Add a family under each of its model types; a later one replaces an earlier one."""
    for model_type in family.model_types:
        FAMILIES[model_type] = family
    return family


for _family in (BERT, ROBERTA, DISTILBERT, T5, OPT, LLAMA, GPT2, VIT, BART):
    register_family(_family)


def find_sites(model: nn.Module, include: Collection[str] = INCLUDES, *, gqa: str = "groups") -> tuple[Site, ...]:
    """Return the prunable sites of a transformers model.

    Args:
        model: a model whose ``config.model_type`` is registered; bare or with a task head, which
            give the same site names.
        include: some of ``"heads"``, ``"neurons"``, ``"input_dims"``.
        gqa: what the units of grouped-query attention are. ``"groups"``: whole KV groups (kind ``"kv_group"``).
            ``"query-heads"``: query heads (kind ``"head"``, `Site.n_groups` KV groups), of which every plan keeps
            the same number in each group, because transformers assigns query heads to key/value heads by
            position: with unequal counts a cut model would run and be wrong. Keys and values stay whole.
            ``"any-query-heads"``: query heads without that rule; a model cut by such a plan needs
            ``compact(..., duplicate_kv=True)``, which gives key/value heads several copies.
            Makes no difference to models without grouped-query attention.

    Raises:
        ValueError: unknown model type, unknown `include` or `gqa`, shapes that contradict the config
            (an already pruned model), quantised or tied weights.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> for site in find_sites(BertModel(config)):
        ...     print(site.name, site.kind, site.n_units)
        encoder.0.attention head 2
        encoder.0.attention.input input_dim 8
        encoder.0.ffn neuron 12
    """
    unknown = sorted(set(include) - set(INCLUDES))
    if unknown or isinstance(include, str):
        raise ValueError(f"unknown include {include!r}; choose from {', '.join(INCLUDES)}")
    if gqa not in GQA:
        raise ValueError(f"unknown gqa {gqa!r}; choose from {', '.join(GQA)}")
    check_plain(model)
    model_type = getattr(model_config(model), "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"no adapter for model_type={model_type!r}; known: {', '.join(sorted(FAMILIES))}; "
            "pass sites=[Site(...), ...] by hand (see topoprune.Site)"
        )
    sites = sites_of_family(model, FAMILIES[model_type], include, gqa)
    check_sites(model, sites)
    return sites
