"""Run one benchmark: ``python -m benchmarks NAME [--quick] [--device cpu|cuda] [--json FILE]``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.harness import Options, Outcome, table, write_json
from benchmarks.report import markdown

# Name -> one line; each is a module of this package with `run(options) -> Outcome`.
BENCHMARKS = {
    "step_overhead": "what pruning adds to a training step: masks, penalties, re-solves",
    "extract": "similarity graphs against the bare matrix products they need",
    "head_solve": "every dominating-set solver on all head graphs of a model: size, gap, ms",
    "neuron_solve": "greedy in milliseconds and local search in size on neuron graphs",
    "edge_select": "edge masks of a 768 x 3072 layer: seconds and certified gap, beside min-cost flow; N:M masks",
    "pace": "public dominating-set instances: size, bound and gap against the best known values",
    "layer_budget": "one choice per layer under two budgets: certified gap and seconds of every solver",
    "train_time": "fine-tuning to 80 % sparsity against dense fine-tuning: seconds, score, memory",
    "inference": "forward passes of compacted models against dense, natively built and Torch-Pruning's ones",
    "artefact": "saving and loading compacted models against save_pretrained and from_pretrained, per byte",
    "quality_lm": "stories260k: loss after one-shot pruning, ours against baselines",
    "quality_glue": "MiniLM on SST-2 and MRPC: dense, NeuroPrune and budget side by side",
}


def main() -> int:
    """Parse, run, print, write; the exit code is 0 when correct, 1 when not, 2 when unusable."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names of all benchmarks")
    parser.add_argument("--report", action="store_true", help="print the saved results as a Markdown table")
    parser.add_argument("--quick", action="store_true", help="a smaller run, within a minute")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write figures, rows and environment here")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(BENCHMARKS))
        return 0
    if arguments.report:
        print(markdown())
        return 0
    if arguments.name is None:
        parser.error(f"name a benchmark: {', '.join(BENCHMARKS)}")
    if arguments.json and not Path(arguments.json).resolve().parent.is_dir():
        parser.error(f"--json {arguments.json}: folder does not exist")
    if arguments.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA device is available here")
    options = Options(arguments.quick, arguments.device, arguments.seed)
    outcome: Outcome = import_module(f"benchmarks.{arguments.name}").run(options)
    for note in outcome.notes:
        print(note)
    print(table(outcome.figures))
    print("correct" if outcome.correct else "NOT CORRECT: the figures above mean nothing")
    if arguments.json and not outcome.figures:
        print(f"nothing was measured: {arguments.json} is not written")
    elif arguments.json:
        write_json(arguments.json, arguments.name, options, outcome)
        print(f"written to {arguments.json}")
    return 0 if outcome.correct else 1


if __name__ == "__main__":
    sys.exit(main())
