"""Masked ≡ compacted ≡ reloaded: weights bit for bit, outputs exactly, for every family and every way to load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compaction.cases import EMPTY, empty_plan, structure_plan
from tests.compaction.filetools import content, outputs, same_state, small, state
from tests.masktools import random_plan
from tests.prunertools import batch_of
from tests.tiny import FAMILIES, build
from topoprune import Plan, apply, compact, kept_units, load, save

WRITTEN = {"README.md", "config.json", "modeling_topoprune.py", "topoprune.json", "topoprune_plan.npz"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_saved(family: str, tmp_path: Path) -> None:
    model, plan = small(family)
    folder = save(model, plan, tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    assert names - {"generation_config.json"} == {*WRITTEN, "model.safetensors"}
    again = load(folder)
    assert type(again) is type(model) and not again.training
    assert again.config.topoprune == model.config.topoprune
    same_state(again, model)
    for name, kept in kept_units(model).items():
        np.testing.assert_array_equal(kept_units(again)[name], kept)
    stored = Plan.load(folder / "topoprune_plan.npz")
    for name, solution in plan.solutions.items():
        np.testing.assert_array_equal(stored.keep(name), solution.keep)
    for name, data in content(folder).items():
        assert os.fsencode(tmp_path) not in data, f"{name} names a folder of this machine"


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_heads_or_neurons_survive(family: str, tmp_path: Path) -> None:
    """Tensors without entries: they share no memory, and none is lost."""
    model, plan = small(family, empty_plan(build(family), EMPTY["nothing"]))
    assert any(p.numel() == 0 for p in model.parameters())
    same_state(load(save(model, plan, tmp_path / "model")), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_half_precision_and_device_map(family: str, tmp_path: Path) -> None:
    model, plan = small(family)
    folder = save(model, plan, tmp_path / "model", max_shard_size="6KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    placed = load(folder, device_map="auto")
    same_state(placed, model)
    half = load(folder, dtype=torch.bfloat16)
    expected = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    assert all(torch.equal(p, expected[name]) for name, p in half.named_parameters())
    # Indices stay integers.
    assert {n: b.dtype for n, b in half.named_buffers() if not b.is_floating_point()} == {
        n: b.dtype for n, b in model.named_buffers() if not b.is_floating_point()
    }
    assert torch.isfinite(outputs(half).float()).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_hold_and_it_trains_on(family: str, tmp_path: Path) -> None:
    model, plan = small(family)
    again: Any = load(save(model, plan, tmp_path / "model"))
    pairs = [_ties(m) for m in (model, again)]
    assert pairs[0] == pairs[1]
    before = state(again)
    optimizer = torch.optim.Adam([p for p in again.parameters() if p.numel()], lr=3e-3)
    losses = []
    for _ in range(6):  # in eval mode: dropout would make a short run's loss go up or down by chance
        optimizer.zero_grad()
        batch = batch_of(again, 0) if family != "vit" else {**batch_of_images(again)}
        loss = again(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert state(again) != before
    # Trainer writes with save_pretrained alone.
    again.save_pretrained(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="without verification"):
        resumed = load(tmp_path / "checkpoint")
    same_state(resumed, again)


def batch_of_images(model: Any) -> dict[str, torch.Tensor]:
    from tests.tiny import inputs

    given = inputs(model, 4)
    return {**given, "labels": torch.arange(4) % 2}


def _ties(model: Any) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_pruning_after_loading(family: str, tmp_path: Path) -> None:
    """Kept units name units of the dense model through both generations; the folder is replaced."""
    model, plan = small(family)
    first = load(save(model, plan, tmp_path / "model"))
    second = structure_plan(first, share=0.25, seed=1)
    with apply(first, second):
        masked = outputs(first)
    folder = save(first, second, tmp_path / "model")
    smaller = load(folder)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in first.parameters())
    torch.testing.assert_close(outputs(smaller), masked, rtol=1e-4, atol=1e-4)
    older, newer = kept_units(first), kept_units(smaller)
    assert all(set(newer[name]) <= set(older[name]) for name in older)
    # The second plan counts in units of the first generation.
    name = next(site.name for site in second.sites if site.kind == "neuron")
    np.testing.assert_array_equal(newer[name], older[name][second.keep(name)])
    same_state(load(save(smaller, second, tmp_path / "copy")), smaller)


def test_save_compacts_what_is_dense_or_masked(tmp_path: Path) -> None:
    dense = build("bert")
    plan = structure_plan(dense)
    expected = compact(dense, plan)
    before = state(dense)
    same_state(load(save(dense, plan, tmp_path / "dense")), expected)
    with apply(dense, plan):
        same_state(load(save(dense, plan, tmp_path / "masked")), expected)
        same_state(load(save(dense, None, tmp_path / "dead units")), expected)
    assert state(dense) == before
    assert not (tmp_path / "dead units" / "topoprune_plan.npz").exists()


def test_rounded_models_and_gathers_keep_their_plan_on_record(tmp_path: Path) -> None:
    dense = build("llama")
    plan = random_plan(dense)
    model = compact(dense, plan, rounding=8, gather="always")
    folder = save(model, plan, tmp_path / "model")
    same_state(load(folder), model)
    other = structure_plan(build("llama"), share=0.25, seed=3)
    with pytest.raises(ValueError, match="not the one this model was compacted by"):
        save(compact(dense, structure_plan(dense, share=0.75)), other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model, plan = small("t5")
    one, other = (content(save(model, plan, tmp_path / name)) for name in ("one", "other"))
    assert one == other


def test_save_pretrained_into_a_saved_folder(tmp_path: Path) -> None:
    """The manifest would speak of the weights before; it goes, and nothing is taken for verified."""
    model, plan = small("bert")
    folder = save(model, plan, tmp_path / "model")
    again = load(folder)
    with torch.no_grad():
        again.classifier.bias.add_(1)
    again.save_pretrained(folder)
    assert not (folder / "topoprune.json").exists()
    with pytest.warns(UserWarning, match="without verification"):
        same_state(load(folder), again)
    save(again, plan, folder)
    same_state(load(folder), again)


def test_trainer_writes_what_load_reads(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = small("bert")
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=2, save_steps=1, report_to=[], use_cpu=True)
    rows = [{key: value[i] for key, value in batch_of(model, 0).items()} for i in range(4)]
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model.eval()
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        with pytest.warns(UserWarning, match="without verification"):
            same_state(load(folder), model)


def test_options_of_from_pretrained_pass_through(tmp_path: Path) -> None:
    model, plan = small("llama")
    again = load(save(model, plan, tmp_path / "model"), attn_implementation="eager", torch_dtype=torch.float64)
    assert again.config._attn_implementation == "eager" and again.dtype == torch.float64
    with pytest.raises((ValueError, ImportError)):
        load(tmp_path / "model", attn_implementation="nothing of the kind")


def test_a_tokenizer_comes_along_without_its_path(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {"[UNK]": 0, "[PAD]": 1, "a": 2}
    raw = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", pad_token="[PAD]"
    )
    raw.save_pretrained(str(tmp_path / "tokenizer"))
    model, plan = small("bert")
    folder = save(model, plan, tmp_path / "model", tokenizer=AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer")))
    assert AutoTokenizer.from_pretrained(str(folder)).get_vocab() == words
    assert all(os.fsencode(tmp_path) not in data for data in content(folder).values())
    # Saving again without it leaves it there.
    save(model, plan, folder)
    assert AutoTokenizer.from_pretrained(str(folder)).get_vocab() == words


@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_config_where_it_says_everything(family: str, tmp_path: Path) -> None:
    """Other runtimes may build from it; a model that it cannot describe has none."""
    from transformers import AutoConfig, PreTrainedConfig

    neurons_only = random_plan(build(family), kinds=("neuron",))
    model, plan = small(family, neurons_only)
    folder = save(model, plan, tmp_path / "neurons")
    written = json.loads((folder / "config.json").read_text()).get("per_layer_config")
    if not hasattr(PreTrainedConfig, "per_layer_config") or family in ("t5", "t5-gated"):
        assert written is None  # one d_ff for the encoder's and the decoder's layers
        return
    config = AutoConfig.from_pretrained(folder)
    for name, kept in kept_units(model).items():
        stack, layer, _ = name.split(".")
        attribute = {"distilbert": "hidden_dim", "gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size")
        if family in ("bart", "marian"):
            attribute = f"{stack}_ffn_dim"
        assert getattr(config.per_layer_config[int(layer)], attribute) == len(kept)
    loaded = load(folder)
    same_state(loaded, model)
    assert not getattr(loaded.config, "is_heterogeneous", False)  # pruned again, it would be untrue

    heads, plan = small(family)
    layers = json.loads((save(heads, plan, tmp_path / "heads") / "config.json").read_text()).get("per_layer_config")
    assert (layers is not None) == (family in ("llama", "qwen2", "qwen3"))
    if layers is not None:
        assert {row["num_key_value_heads"] for row in layers.values()} == {1}
        assert {row["num_attention_heads"] for row in layers.values()} == {2}


def test_files_have_ordinary_rights(tmp_path: Path) -> None:
    model = build("bert")
    folder = save(model, structure_plan(model, 0.5, 0), tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == {
        file.name: 0o666 & ~umask for file in folder.iterdir()
    }
