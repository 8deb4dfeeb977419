"""A tiny text classification task and a tiny BERT with a tokenizer, written to a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

__all__ = ["WORDS", "rows", "save_model", "write_task"]

WORDS = ("good fine great nice kind bad poor awful dull weak " + " ".join(f"w{i}" for i in range(30))).split()


def save_model(folder: Path, seed: int = 0) -> Path:
    """Save a 2-layer BERT (d 24, 4 heads, 40 neurons) and a word-level tokenizer; return the folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=32,
        )
        BertModel(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, object]]:
    """Return sentences whose label says whether a good word (the first five) is among them."""
    draw = random.Random(seed)
    result: list[dict[str, object]] = []
    for i in range(count):
        label = i % 2
        words = draw.sample(WORDS[10:], draw.randint(3, 8))
        words.insert(draw.randint(0, len(words)), draw.choice(WORDS[:5] if label else WORDS[5:10]))
        result.append({"sentence": " ".join(words), "label": label})
    return result


def write_task(folder: Path, train: int = 96, validation: int = 32) -> tuple[Path, Path]:
    """Write train.jsonl and dev.jsonl; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "dev.jsonl"
    for path, count, seed in zip(paths, (train, validation), (1, 2), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    return paths
