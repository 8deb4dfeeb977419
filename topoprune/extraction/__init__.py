"""Extraction: weights and activations in, `ModelGraph` out. Everything heavy stays on the model's device."""

from topoprune.extraction.build import connectivity, extract, site_graph
from topoprune.extraction.gram import GramCollector, collect_gram
from topoprune.extraction.grammath import consumer_blocks, unit_energy, unit_gram
from topoprune.extraction.importance import IMPORTANCES, gram_diagonal, magnitude
from topoprune.extraction.measures import Measure, get_measure, measure_names, register_measure
from topoprune.extraction.tensors import check_finite, named_tensors, unit_blocks, unit_rows, weights_digest
from topoprune.extraction.tiles import complete_graph, nearest_graph, threshold_graph

__all__ = [
    "IMPORTANCES",
    "GramCollector",
    "Measure",
    "check_finite",
    "collect_gram",
    "complete_graph",
    "connectivity",
    "consumer_blocks",
    "extract",
    "get_measure",
    "gram_diagonal",
    "magnitude",
    "measure_names",
    "named_tensors",
    "nearest_graph",
    "register_measure",
    "site_graph",
    "threshold_graph",
    "unit_blocks",
    "unit_energy",
    "unit_gram",
    "unit_rows",
    "weights_digest",
]
