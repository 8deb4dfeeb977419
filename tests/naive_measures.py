"""Slow twins of the measures, an obvious loop each, and the small things the extraction tests share."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from topoprune.extraction import consumer_blocks, unit_blocks, unit_rows
from topoprune.graph import Graph, Site, TensorSlice

__all__ = [
    "CUSTOM",
    "DATA_FREE",
    "consumer_inputs",
    "custom_model",
    "edge_set",
    "naive_circuit_cosine",
    "naive_linf",
    "naive_nearest",
    "naive_output_gram",
    "perturbed",
    "real_tokens",
]

DATA_FREE = ("circuit-cosine", "weights-linf")
CUSTOM = Site(
    name="ffn",
    kind="neuron",
    n_units=6,
    unit_width=1,
    reads=(TensorSlice("0.weight", 0, "in", (6, 3)), TensorSlice("0.bias", 0, "in_bias", (6,))),
    writes=(TensorSlice("2.weight", 1, "out", (4, 6)),),
    consumer="2",
    block="ffn",
)


def custom_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))


def naive_linf(tensors: dict[str, torch.Tensor], site: Site) -> np.ndarray:
    rows = [
        torch.cat([unit_rows(tensors, site, s)[u] for s in site.reads if len(s.shape) == 2])
        for u in range(site.n_units)
    ]
    return np.array([[float((a - b).abs().max()) for b in rows] for a in rows])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def naive_circuit_cosine(tensors: dict[str, torch.Tensor], site: Site) -> np.ndarray:
    """Build every operator in full (d x d for heads) and compare."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    n = site.n_units
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if site.kind == "neuron":
                similarity = 1.0
                for piece in site.slices:
                    if len(piece.shape) == 2:
                        rows = unit_rows(tensors, site, piece)
                        similarity *= cosine(rows[i], rows[j])
            else:
                pairs = [("v", "o")] if site.rotary else [("v", "o"), ("q", "k")]
                similarity = 0.0
                for left, right in pairs:
                    operators = []
                    for unit in (i, j):
                        a, b = (
                            sum(unit_blocks(tensors, site, site.one(role))[unit].split(site.head_width))  # type: ignore[arg-type]
                            for role in (left, right)
                        )
                        operators.append(a.T @ b)
                    similarity += cosine(*operators) / len(pairs)
            result[i, j] = min(1.0, max(0.0, 1 - similarity))
    np.fill_diagonal(result, 0.0)
    return result


def consumer_inputs(
    model: nn.Module, sites: list[Site], batches: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """All non-padding rows that reach each consumer, collected token by token."""
    rows: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    for batch in batches:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(site.consumer).register_forward_pre_hook(  # type: ignore[arg-type]
                lambda module, args, name=site.name, seen=seen: seen.__setitem__(name, args[0])
            )
            for site in sites
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        for site in sites:
            real = real_tokens(batch, site, seen[site.name])
            values = seen[site.name].reshape(*real.shape, -1)
            rows[site.name] += [values[b, t] for b in range(len(real)) for t in range(real.shape[1]) if real[b, t]]
    return {name: torch.stack(found) for name, found in rows.items()}


def real_tokens(batch: dict[str, torch.Tensor], site: Site, values: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: no padding. Without any mask (images) every patch and the class token are real."""
    if site.stack == "decoder" and "labels" in batch:
        return batch["labels"] != -100
    if "attention_mask" in batch:
        return batch["attention_mask"] == 1
    return torch.ones(values.shape[:2], dtype=torch.bool)


def naive_output_gram(tensors: dict[str, torch.Tensor], site: Site, rows: torch.Tensor) -> np.ndarray:
    """Mean over tokens of the inner products of what each unit adds."""
    blocks = consumer_blocks(tensors, site).double()
    total = torch.zeros(site.n_units, site.n_units, dtype=torch.float64)
    for row in rows.double():
        parts = row.reshape(site.n_units, site.unit_width)
        added = torch.stack([parts[u] @ blocks[u] for u in range(site.n_units)])
        total += added @ added.T
    return (total / len(rows)).numpy()


def naive_nearest(distance: np.ndarray, k: int) -> set[tuple[int, int]]:
    edges = set()
    for i, row in enumerate(distance):
        order = sorted((float(d), j) for j, d in enumerate(row) if j != i)
        edges |= {(min(i, j), max(i, j)) for _, j in order[:k]}
    return edges


def edge_set(graph: Graph) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in graph.edge_list()[0]}


def perturbed(model: nn.Module, name: str, value: float, index: tuple[int, ...] = (0, 0)) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        dict(model.named_parameters())[name][index] = value
    return model
