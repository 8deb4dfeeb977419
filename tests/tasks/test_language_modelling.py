"""Language modelling: texts in blocks, perplexity by hand, and training of decoders with every recipe."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.datafiles import save_rows
from tests.tasks.texttools import (
    BUDGET,
    CAUSAL,
    PAPER,
    SHORT,
    assert_equal_weights,
    assert_goes_on_exactly,
    assert_pruned,
    make_story,
    run,
    tiny,
    write_jsonl,
)
from topoprune.tasks import docstring_text, load_docstring_text, load_text, train
from topoprune.tasks.seq2seq import token_sums


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_story(tmp_path_factory.mktemp("story"))


# -- data -------------------------------------------------------------------------------------


def test_plain_files_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffOne.\nTwo.", encoding="utf-8")
    table = save_rows(tmp_path / "b.csv", [{"text": "x", "n": 1}, {"text": " ", "n": 2}, {"text": "y\nz", "n": 3}])
    task = load_text(tmp_path / "a.txt", table)
    assert task.train == ("One.\nTwo.",) and task.validation == ("x", "y\nz")


def test_bad_files(tmp_path: Path, files: tuple[Path, Path]) -> None:
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"body": "x", "n": 3}])
    with pytest.raises(ValueError, match=r"no text column found among body, n .*give --text-column"):
        load_text(odd, odd)
    with pytest.raises(ValueError, match=r"odd.jsonl has no column 'text'; its columns are: body, n"):
        load_text(files[0], odd)
    with pytest.raises(ValueError, match=r"odd.jsonl, line 1: column 'n' holds 3, expected a text"):
        load_text(odd, odd, text_column="n")
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": " "}])
    with pytest.raises(ValueError, match="all 1 texts in column 'text' are empty"):
        load_text(files[0], empty)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        load_text(tmp_path / "blank.txt", files[1])
    (tmp_path / "binary.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text .* at byte 2"):
        load_text(tmp_path / "binary.txt", files[1])
    with pytest.raises(FileNotFoundError, match="no data file"):
        load_text(tmp_path / "nowhere.txt", files[1])
    with pytest.raises(ValueError, match="block_size is 1"):
        load_text(*files, block_size=1)
    with pytest.raises(ValueError, match="asked for 0 blocks"):
        load_text(*files).limit(0, None)


@pytest.mark.parametrize("size", [5, 7, 24])
def test_blocks_hold_every_token_once(tmp_path: Path, size: int) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"some words {i} here\n"} for i in range(9)])
    task = load_text(path, path, block_size=size)
    model = tiny("gpt2")
    tokenizer = task.load_processor(model, SHORT)
    network = task.load_model(model, tokenizer, SHORT)
    blocks = task.encode(tokenizer, network, SHORT)["train"]
    stream = [token for block in blocks for token in block["input_ids"]]
    assert all(len(block["input_ids"]) == size for block in blocks[:-1]) and 1 < len(blocks[-1]["input_ids"]) <= size
    texts = tokenizer.decode(stream).split(tokenizer.eos_token)
    # A last block of a single token would predict nothing and is left out: at most the final end-of-text token.
    assert texts[:9] == list(task.train)
    batch = task.collator(tokenizer, network)([blocks[0], blocks[-1]])
    padded = batch["attention_mask"] == 0
    assert (batch["labels"][padded] == -100).all() and padded.sum() == size - len(blocks[-1]["input_ids"])
    limited = task.limit(3, 2, seed=1)
    splits = limited.encode(tokenizer, network, SHORT)
    assert (len(splits["train"]), len(splits["validation"])) == (3, 2) and limited.digest != task.digest


def test_equal_texts_with_other_blocks_are_another_task(files: tuple[Path, Path]) -> None:
    assert load_text(*files, block_size=8).digest != load_text(*files, block_size=9).digest


def test_the_embedded_text_is_kept_in_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def collect(stdlib: Path) -> list[str]:  # reading the library itself takes seconds: see the summaries' test
        read.append(stdlib)
        return [f"Do thing {i} well.\n\nMore." for i in range(1200)]

    monkeypatch.setattr(docstring_text, "collect_texts", collect)
    task = load_docstring_text(cache=tmp_path)
    assert task.n_train > 900 and task.n_validation > 100 and not set(task.train) & set(task.validation)
    assert load_docstring_text(cache=tmp_path, block_size=8).train == task.train and len(read) == 1
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.warns(UserWarning, match="is not readable"):
        assert load_docstring_text(cache=tmp_path).digest == task.digest
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot write the cache"):
        load_docstring_text(cache=tmp_path / "file")
    assert len(read) == 3


def test_too_few_docstrings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text('"""One docstring of several words."""')
    with pytest.raises(ValueError, match=r"found only 1 docstrings under .* Use your own data"):
        docstring_text.collect_texts(tmp_path)


# -- scores -------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6), st.booleans())
def test_token_sums_by_hand(texts: int, length: int, seed: int, shift: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(texts, length, 5, generator=generator, dtype=torch.float64).float()
    labels = torch.randint(-1, 5, (texts, length), generator=generator)
    labels = labels.masked_fill(labels < 0, -100)
    found = token_sums((logits, "ignored"), labels, shift=shift)
    for text in range(texts):
        nats, right, count = 0.0, 0, 0
        for at in range(length - shift):
            label = int(labels[text, at + shift])
            if label != -100:
                shares = torch.softmax(logits[text, at], dim=0)
                nats, count = nats - math.log(float(shares[label])), count + 1
                right += int(shares.argmax()) == label
        assert found[text].tolist() == pytest.approx([nats, right, count], abs=1e-4)


def test_frequencies_alone_give_the_floor(files: tuple[Path, Path]) -> None:
    task = load_text(*files, block_size=16)
    tokenizer = task.load_processor(tiny("gpt2"), SHORT)
    floors = task.floors_for(tokenizer, SHORT)
    assert 2 < floors["perplexity"] < len(tokenizer) and 0 < floors["token_accuracy"] < 0.5
    assert task.floors["perplexity"] == math.inf


# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize(
    ("recipe", "compact"), [(BUDGET, False), (BUDGET, True), (PAPER, False)], ids=["budget", "compact", "neuroprune"]
)
def test_every_family_is_pruned(
    files: tuple[Path, Path], tmp_path: Path, model_type: str, recipe: Any, compact: bool
) -> None:
    result = run(model_type, load_text(*files, block_size=16), recipe, tmp_path, compact=compact)
    assert_pruned(result, 0.5 if recipe is BUDGET else None)
    assert result.metric == "perplexity" and not result.higher_is_better
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))


def test_pretraining_while_pruning_beats_the_floor_and_repeats(files: tuple[Path, Path], tmp_path: Path) -> None:
    task = load_text(*files, block_size=32)
    settings = replace(SHORT, epochs=10, batch_size=4, learning_rate=1e-2)
    results = [run("llama", task, BUDGET, tmp_path / name, training=settings) for name in ("one", "two")]
    assert results[0].metrics == results[1].metrics and results[0].score < results[0].floor
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


def test_the_scores_are_those_of_the_saved_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("opt", load_text(*files, block_size=64), None, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = [*tokenizer(files[1].read_text())["input_ids"], tokenizer.eos_token_id]
    nats = tokens = 0.0
    for start in range(0, len(ids), 64):
        block = torch.tensor([ids[start : start + 64]])
        if block.shape[1] > 1:
            with torch.no_grad():
                nats += float(model(input_ids=block, labels=block).loss) * (block.shape[1] - 1)
            tokens += block.shape[1] - 1
    assert result.metrics["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_a_run_goes_on_exactly(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_text(*files, block_size=16)
    assert_goes_on_exactly(
        lambda folder, resume: run("gpt2", task, BUDGET, folder, resume=resume), tmp_path, monkeypatch, 5
    )


def test_models_of_another_kind_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    task = load_text(*files, block_size=16)
    for source, kind in ((tiny("t5"), "t5"), ("embedded", "bert")):
        with pytest.raises(ValueError, match=rf"is a {kind}, which is no decoder; .* such as gpt2, opt"):
            train(source, task, output_dir=tmp_path / kind, training=SHORT)
    with pytest.raises(ValueError, match="block_size is 65, but this gpt2 has 64 positions"):
        run("gpt2", load_text(*files, block_size=65), None, tmp_path / "long")


@pytest.mark.pretrained
@pytest.mark.skipif("TOPOPRUNE_DATA" not in os.environ, reason="TOPOPRUNE_DATA names no folder with data")
def test_a_pretrained_model_knows_its_stories(tmp_path: Path) -> None:
    folder = Path(os.environ["TOPOPRUNE_DATA"])
    story = folder / "data" / "tinystories_sample" / "test.jsonl.gz"
    task = load_text(story, story, block_size=512)
    tokenizer = task.load_processor(folder / "models" / "stories260k-llama", SHORT)
    stream = np.concatenate([tokenizer(text)["input_ids"] for text in task.train])
    assert len(stream) > 500
    result = train(
        folder / "models" / "stories260k-llama",
        task,
        output_dir=tmp_path,
        training=replace(SHORT, epochs=1, learning_rate=1e-9),
    )
    assert 1.1 < result.metrics["loss"] < 1.6 < math.log(result.floor)
