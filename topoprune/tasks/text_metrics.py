"""What generated text scores (ROUGE, BLEU, chrF) and what a language model scores (perplexity, token accuracy).

The figures of generated text are percentages, as papers print them. The packages that compute them are the extra
``topoprune[text]``; none of them asks the network for anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

__all__ = [
    "bleu_scores",
    "first_sentence",
    "need_package",
    "perplexity",
    "rouge_scores",
    "sentences",
    "unigram_floor",
]

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# An end mark with the quotes and brackets after it, then a space and something that may open a sentence.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
# What ends with a full stop without ending a sentence.
_ABBREVIATIONS = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|al|Fig|Eq|Sec|Dr|Mr|Mrs|Ms|No|St|approx)|\b[A-Z])\.$")


def rouge_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ROUGE-1, -2, -L and -Lsum: mean F1 over the texts, with Porter's stemmer.

    Args:
        predictions: generated texts. references: right answers of each, at least one; of several, each score takes
            the one that fits best.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``, in percent.

    Raises:
        ValueError: rouge-score is not installed, no texts, or numbers of texts that differ.

    References: Lin 2004, ROUGE: a package for automatic evaluation of summaries.

    Example:
        >>> round(rouge_scores(["the cat sat"], [["the cat sat down"]])["rouge1"], 1)  # doctest: +SKIP
        85.7
    """
    _check(predictions, references)
    need_package("rouge_score", "rouge-score", "ROUGE")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
    total = dict.fromkeys(_ROUGE, 0.0)
    for predicted, targets in zip(predictions, references, strict=True):
        # -Lsum compares sentence by sentence, one a line.
        lines = ["\n".join(sentences(target)) for target in targets]
        for name, score in scorer.score_multi(lines, "\n".join(sentences(predicted))).items():
            total[name] += score.fmeasure
    return {name: 100.0 * value / len(predictions) for name, value in total.items()}


def bleu_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str = ""
) -> dict[str, float]:
    """Return corpus BLEU and chrF as sacreBLEU defines them; all references count.

    Args:
        predictions: translations. references: right answers of each, at least one.
        language: of the translations; ``zh`` gets sacreBLEU's own tokenizer (``ja`` and ``ko`` would need
            dictionaries: characters), all others ``13a``.

    Returns:
        ``bleu`` and ``chrf``, in percent.

    Raises:
        ValueError: sacrebleu is not installed, no texts, or numbers of texts that differ.

    References: Post 2018 (arXiv 1804.08771); Popović 2015, chrF.
    """
    _check(predictions, references)
    need_package("sacrebleu", "sacrebleu", "BLEU and chrF")
    from sacrebleu.metrics import BLEU, CHRF

    # Streams: the i-th holds the i-th reference of every text, None where a text has fewer.
    depth = max(len(targets) for targets in references)
    streams: list[Any] = [[targets[i] if i < len(targets) else None for targets in references] for i in range(depth)]
    code = re.split("[-_]", language.lower())[0]
    tokenize = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}.get(code, "13a")
    translations = list(predictions)
    scores = {
        "bleu": BLEU(tokenize=tokenize).corpus_score(translations, streams).score,
        "chrf": CHRF().corpus_score(translations, streams).score,
    }
    return {name: min(100.0, float(score)) for name, score in scores.items()}  # perfect ones come out above by rounding


def perplexity(sums: Any) -> dict[str, float]:
    """Return what a language model scores on its tokens.

    Args:
        sums: (texts, 3): of every text the negative log-likelihood in nats, the tokens predicted rightly, and the
            tokens.

    Returns:
        ``loss`` (nats a token), ``perplexity`` (its exponential; inf where that overflows) and ``token_accuracy``
        in [0, 1].

    Raises:
        ValueError: not a single token was predicted.

    Example:
        >>> perplexity([[0.0, 2, 2], [0.0, 1, 2]])
        {'loss': 0.0, 'perplexity': 1.0, 'token_accuracy': 0.75}
    """
    nats, right, tokens = np.asarray(sums, dtype=np.float64).reshape(-1, 3).sum(axis=0).tolist()
    if tokens < 1:
        raise ValueError("the validation texts hold no token to predict; each needs at least two tokens")
    loss = nats / tokens
    return {"loss": loss, "perplexity": _exponential(loss), "token_accuracy": right / tokens}


def unigram_floor(train: np.ndarray, validation: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Return what is reached without looking at the context: token frequencies of the training text.

    Args:
        train, validation: (tokens,) token ids; of validation, those that are to be predicted.
        vocabulary: number of token ids; each gets one count beforehand (Laplace), so that none is impossible.

    Returns:
        ``perplexity`` and ``token_accuracy`` (of always saying the commonest token).
    """
    counts = np.bincount(train, minlength=vocabulary).astype(np.float64)
    log_share = np.log(counts + 1) - math.log(counts.sum() + counts.size)
    accuracy = float(np.mean(validation == int(counts.argmax())))
    return {"perplexity": _exponential(-float(log_share[validation].mean())), "token_accuracy": accuracy}


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; line ends count as sentence ends.

    A rule of thumb for European scripts: an end mark, a space and a capital, digit or bracket; some abbreviations
    are known.

    Example:
        >>> sentences("It works, e.g. here. Does it? (Yes.) Fine")
        ['It works, e.g. here.', 'Does it?', '(Yes.)', 'Fine']
    """
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _SENTENCE_END.finditer(line):
            if not _ABBREVIATIONS.search(line[start : match.start()]):
                found.append(line[start : match.end()].strip())
                start = match.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def first_sentence(text: str) -> str:
    """Return the first sentence of a text: the summary to beat (lead-1)."""
    return next(iter(sentences(text)), "")


def need_package(module: str, package: str, what: str) -> None:
    """Refuse with advice where a package is missing.

    Raises:
        ValueError: it cannot be imported; names the extra that brings it.
    """
    if find_spec(module) is None:
        raise ValueError(f"{what} needs the package {package}: pip install 'topoprune[text]'")


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise ValueError("no texts to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} texts; expected one for each")
    empty = next((i for i, targets in enumerate(references) if not targets), None)
    if empty is not None:
        raise ValueError(f"text {empty} has no reference; expected at least one for each")
