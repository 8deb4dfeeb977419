"""Metrics of classification and regression, and what the simplest answer reaches.

References: Wang et al. 2018, GLUE (arXiv 1804.07461), table 1: Matthews correlation for CoLA, accuracy and F1 for
MRPC and QQP, Pearson and Spearman correlation for STS-B, accuracy elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = ["METRICS", "combine", "score", "simplest_scores"]


def score(metrics: Sequence[str], predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return metrics by name.

    Args:
        metrics: keys of `METRICS`.
        predicted: (n,) class indices, or numbers. truth: (n,) likewise.

    Example:
        >>> score(("accuracy", "f1"), np.array([1, 0, 1]), np.array([1, 0, 0]))
        {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
    """
    return {name: METRICS[name](predicted, truth) for name in metrics}


def combine(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """Return GLUE's score of a task with several metrics: their mean."""
    return sum(metrics[name] for name in names) / len(names)


def simplest_scores(metrics: Sequence[str], train: np.ndarray, truth: np.ndarray, regression: bool) -> dict[str, float]:
    """Return the metrics of always answering the commonest training class, or the mean training label."""
    if regression:
        answer = float(np.mean(train))
    else:
        values, counts = np.unique(train, return_counts=True)
        answer = values[np.argmax(counts)]
    return score(metrics, np.full(len(truth), answer), truth)


def _accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean(predicted == truth))


def _f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F1 of class 1; 0 where neither the answers nor the truth has it."""
    hits = int(np.sum((predicted == 1) & (truth == 1)))
    either = int(np.sum(predicted == 1)) + int(np.sum(truth == 1))
    return 2 * hits / either if either else 0.0


def _matthews(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Correlation of the indicator vectors over all classes (Gorodkin 2004); 0 for a constant answer."""
    size = int(max(predicted.max(), truth.max())) + 1
    confusion = np.zeros((size, size))
    np.add.at(confusion, (truth.astype(int), predicted.astype(int)), 1)
    n, hits = confusion.sum(), np.trace(confusion)
    true, said = confusion.sum(axis=1), confusion.sum(axis=0)
    spread = (n * n - said @ said) * (n * n - true @ true)
    return float((n * hits - true @ said) / np.sqrt(spread)) if spread > 0 else 0.0


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(predicted: np.ndarray, truth: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
            return 0.0  # a constant has no correlation; scipy says nan
        return float(getattr(stats, name)(predicted, truth).statistic)

    return correlation


def _mse(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean((predicted - truth) ** 2))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "mse": _mse,
}
