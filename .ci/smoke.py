"""Smoke test of the installed wheel: extract, solve, apply and undo on a tiny BERT, away from the sources."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import topoprune
import topoprune_solvers


def main(source_tree: Path) -> None:
    """Exit with a message unless the installed packages do the round trip."""
    for package in (topoprune, topoprune_solvers):
        where = Path(package.__file__).resolve()
        if source_tree in where.parents:
            raise SystemExit(f"{package.__name__} was imported from the source tree: {where}")
        if not (where.parent / "py.typed").is_file():
            raise SystemExit(f"{package.__name__}: py.typed is missing from the wheel")

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    model = BertForSequenceClassification(config).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        dense = model(tokens).logits

        graph = topoprune.extract(model, measure="weights-linf")
        plan = topoprune.solve(graph, budget=0.5, problem="heads", solver="greedy")
        handle = topoprune.apply(model, plan)
        pruned = model(tokens).logits
        handle.close()
        restored = model(tokens).logits

    if torch.equal(dense, pruned):
        raise SystemExit("the plan changed nothing")
    if not torch.equal(dense, restored):
        raise SystemExit("closing the handle did not restore the dense logits bit for bit")
    print(plan)
    print(f"smoke test passed with topoprune {topoprune.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
