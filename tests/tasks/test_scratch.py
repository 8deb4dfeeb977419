"""Models and tokenizers from scratch: overrides, vocabularies, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.tasks.texttools import CAUSAL, SEQ2SEQ, TINY, tiny
from topoprune import find_sites
from topoprune.tasks import NewModel, new_model
from topoprune.tasks.scratch import PRESETS, build_model, language_model, new_tokenizer, parse_overrides, tokenizer_for

TEXTS = [f"The {word} sat on mat number {i}, and it’s naïve." for i in range(40) for word in ("cat", "dog")]


# -- overrides ----------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()),
    )
)
def test_overrides_are_read_back(fields: dict[str, Any]) -> None:
    assert parse_overrides(",".join(f"{name}={value}" for name, value in fields.items())) == fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_model", "cannot read 'd_model'"),
        ("=3", "cannot read '=3'"),
        ("a=", "cannot read 'a='"),
        ("a=1,a=2", "a is given twice"),
    ],
)
def test_unreadable_overrides(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_overrides(text)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("t6", "", r"unknown model type 't6'; .*marian.*paper-translation"),
        ("t5", "d_modle=3", r"a t5 configuration has no field 'd_modle'; it has: .*d_model"),
        ("t5", "d_model=small", "d_model is 'small'; a t5 configuration holds a int there, such as 512"),
        ("t5", "d_model=0.5", r"d_model is 0\.5"),
        ("t5", "is_encoder_decoder=1", "is_encoder_decoder is 1; a t5 configuration holds a bool"),
        ("t5", "vocab_size=9", "vocab_size comes from the tokenizer"),
    ],
)
def test_wrong_descriptions(model_type: str, overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(model_type, overrides)


def test_a_small_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 3"):
        new_model("t5", vocab_size=3)


def test_whole_numbers_serve_as_floats() -> None:
    assert new_model("t5", {"dropout_rate": 0}).overrides == {"dropout_rate": 0}


# -- tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "byte-bpe"])
def test_a_tokenizer_repeats_and_survives_saving(tmp_path: Path, kind: Any) -> None:
    tokenizer, again = new_tokenizer(TEXTS, 320, kind=kind), new_tokenizer(reversed(TEXTS), 320, kind=kind)
    assert tokenizer.get_vocab() == again.get_vocab() and len(tokenizer) <= 320
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id] == [
        0,
        1,
        2,
        3,
    ]
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0])["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[0]
    assert (ids[-1] == tokenizer.eos_token_id) is (kind == "bpe")


@given(st.text(max_size=60))
def test_bytes_come_back_exactly(text: str) -> None:
    tokenizer = new_tokenizer(TEXTS[:4], 300, kind="byte-bpe")
    special = ("<pad>", "</s>", "<unk>", "<s>")
    if not any(word in text for word in special):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_no_text_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        new_tokenizer(["", " "])


# -- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(TINY))
def test_a_model_is_built_saved_and_loaded(tmp_path: Path, model_type: str) -> None:
    auto = AutoModelForSeq2SeqLM if model_type in SEQ2SEQ else AutoModelForCausalLM
    tokenizer = new_tokenizer(TEXTS, 300, kind="bpe")
    torch.manual_seed(0)
    model = build_model(tiny(model_type), auto, tokenizer).eval()
    assert model.config.vocab_size == len(tokenizer) and len(find_sites(model)) > 0
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    batch = tokenizer(TEXTS[:2], return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert int(written.max()) < len(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = language_model(tmp_path, auto, tokenizer).eval()
    assert torch.equal(loaded.generate(**batch, max_new_tokens=4, do_sample=False), written)
    with pytest.raises(ValueError, match=r"tokenizer of .* has \d+ tokens, the model embeddings for"):
        language_model(tmp_path, auto, new_tokenizer(TEXTS, 400, kind="byte-bpe"))


@pytest.mark.parametrize("model_type", CAUSAL)
def test_sizes_that_do_not_fit_are_refused(model_type: str) -> None:
    width = {"opt": "hidden_size", "gpt2": "n_embd", "llama": "hidden_size"}[model_type]
    odd = NewModel(model_type, TINY[model_type] | {width: 33})
    with pytest.raises(ValueError, match=f"cannot build a new {model_type}"):
        build_model(odd, AutoModelForCausalLM, new_tokenizer(TEXTS, 300))


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(TEXTS, 300)
    model = build_model(
        new_model("gpt2", TINY["gpt2"] | {"tie_word_embeddings": False}), AutoModelForCausalLM, tokenizer
    )
    model.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 1 weights of a GPT2LMHeadModel, 'lm_head\.weight' first"):
        language_model(tmp_path, AutoModelForCausalLM, tokenizer)


def test_the_papers_translation_model() -> None:
    model = new_model("paper-translation", "d_model=48,encoder_ffn_dim=64,decoder_ffn_dim=64")
    assert model.model_type == "marian" and model.overrides["d_model"] == 48
    network = build_model(model, AutoModelForSeq2SeqLM, new_tokenizer(TEXTS, 100))
    heads = [site for site in find_sites(network) if site.kind == "head"]
    assert len(heads) == 18 and all(site.n_units == 6 for site in heads)
    assert PRESETS["paper-translation"][1]["d_model"] == 6 * 64


def test_a_named_tokenizer_is_taken(tmp_path: Path) -> None:
    new_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    taken = tokenizer_for(new_model("t5", tokenizer=str(tmp_path)), (), kind="bpe")
    assert taken(TEXTS[0])["input_ids"] == new_tokenizer(TEXTS, 300)(TEXTS[0])["input_ids"]
