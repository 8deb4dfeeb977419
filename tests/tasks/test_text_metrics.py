"""Scores of generated text and of language models."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topoprune.tasks import text_metrics
from topoprune.tasks.text_metrics import (
    bleu_scores,
    first_sentence,
    perplexity,
    rouge_scores,
    sentences,
    unigram_floor,
)

TEXTS = ["The cat sat on the mat today.", "Nothing was said. Then the dog came in quietly!"]


@pytest.mark.parametrize("scores", [rouge_scores, bleu_scores])
def test_identical_texts_are_perfect_and_disjoint_ones_score_nothing(scores) -> None:  # type: ignore[no-untyped-def]
    assert all(value == pytest.approx(100) for value in scores(TEXTS, [[text] for text in TEXTS]).values())
    nothing = scores(["zzz qqq", "xxx"], [["aaa bbb ccc"], ["ddd eee"]])
    assert all(value == pytest.approx(0, abs=1e-6) for value in nothing.values())


@pytest.mark.parametrize("scores", [rouge_scores, bleu_scores])
def test_one_right_reference_of_several_is_enough(scores) -> None:  # type: ignore[no-untyped-def]
    references = [["something else altogether", TEXTS[0]], [TEXTS[1]]]
    assert all(value == pytest.approx(100) for value in scores(TEXTS, references).values())


def test_rouge_by_hand() -> None:
    scores = rouge_scores(["the cat sat"], [["the cat sat down"]])
    assert scores["rouge1"] == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 * (2 / 3) / (5 / 3))
    # Sentence by sentence the order of the sentences does not matter, over the whole text it does.
    swapped = rouge_scores(["One two three. Four five six."], [["Four five six. One two three."]])
    assert swapped["rougeLsum"] == pytest.approx(100) and swapped["rougeL"] == pytest.approx(50)


def test_chinese_is_cut_into_characters() -> None:
    texts, near = [["一只猫坐在垫子上面"]], ["一只狗坐在垫子上面"]
    assert bleu_scores(near, texts, language="zh")["bleu"] > bleu_scores(near, texts, language="en")["bleu"]


@pytest.mark.parametrize("scores", [rouge_scores, bleu_scores])
def test_bad_input(scores) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="no texts to score"):
        scores([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 texts"):
        scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="text 1 has no reference"):
        scores(["a", "b"], [["a"], []])


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None if name == "rouge_score" else find_spec(name))
    with pytest.raises(ValueError, match=r"ROUGE needs the package rouge-score: pip install 'topoprune\[text\]'"):
        rouge_scores(["a"], [["a"]])


def test_perplexity_weighs_tokens_not_texts() -> None:
    scores = perplexity(np.array([[3 * math.log(4), 1, 3], [0.0, 1, 1]]))
    assert scores == pytest.approx({"loss": 0.75 * math.log(4), "perplexity": 4**0.75, "token_accuracy": 0.5})
    assert perplexity([[1e6, 0, 1]])["perplexity"] == math.inf
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(np.zeros((2, 3)))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_token_frequencies_are_a_distribution(train: list[int], held_out: list[int]) -> None:
    floor = unigram_floor(np.array(train), np.array(held_out), 5)
    assert 0.999 <= floor["perplexity"] <= len(train) + 5.001 and 0 <= floor["token_accuracy"] <= 1
    counts = [train.count(token) + 1 for token in range(5)]
    nats = -sum(math.log(counts[token] / sum(counts)) for token in held_out) / len(held_out)
    assert floor["perplexity"] == pytest.approx(math.exp(nats))


def test_sentences() -> None:
    text = "It is 3.5 m (e.g. here). “Really?” Yes!\nA new line"
    assert sentences(text) == ["It is 3.5 m (e.g. here).", "“Really?”", "Yes!", "A new line"]
    assert first_sentence("By J. Smith et al. in May. Then more.") == "By J. Smith et al. in May."
    assert sentences("") == [] and first_sentence(" \n") == ""


@given(st.text(max_size=80))
def test_sentences_lose_nothing_but_spaces(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
