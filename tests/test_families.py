"""What is particular to ViT, BART, mBART and Marian: which tokens count, other heads, training, merging and cutting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from tests.masktools import ATTENTION, PAPER, bits, random_plan, untouched
from tests.naive_measures import consumer_inputs
from tests.prunertools import UNDEFINED_PAPER_MERGE, batch_of
from tests.tiny import FAMILIES, HEADS, HIDDEN, LAYERS, NEURONS, SEQ2SEQ, build, drawn, inputs
from topoprune import Recipe, TopoPruneCallback, apply, compact, extract, find_sites, measure_sparsity, solve
from topoprune.architectures import matrix_parameters
from topoprune.extraction import GramCollector, measure_names
from topoprune.graph import structure_digest

T5 = dict(vocab_size=64, d_model=HIDDEN, d_kv=6, d_ff=NEURONS, num_layers=LAYERS, num_heads=HEADS)


def mbart() -> nn.Module:
    return drawn(lambda: MBartForConditionalGeneration(MBartConfig(**SEQ2SEQ)))


TRANSLATORS: dict[str, Callable[[], nn.Module]] = {
    "t5": FAMILIES["t5"],
    "bart": FAMILIES["bart"],
    "marian": FAMILIES["marian"],
    "mbart": mbart,
}
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: BartForSequenceClassification(BartConfig(**SEQ2SEQ, num_labels=3)),
    "bart-questions": lambda: BartForQuestionAnswering(BartConfig(**SEQ2SEQ)),
    "bart-bare": lambda: BartModel(BartConfig(**SEQ2SEQ)),
    "mbart": lambda: MBartForSequenceClassification(MBartConfig(**SEQ2SEQ, num_labels=3)),
    "t5": lambda: T5ForSequenceClassification(T5Config(**T5, num_labels=3, decoder_start_token_id=0, eos_token_id=2)),
}


# Which tokens count


@pytest.mark.parametrize("name", TRANSLATORS)
@pytest.mark.parametrize("given", ["labels", "labels and inputs"])
def test_decoder_tokens_are_those_whose_logits_enter_the_loss(name: str, given: str) -> None:
    """However a family shifts labels into decoder inputs (mBART moves the last token to the front)."""
    model = TRANSLATORS[name]()
    batch = inputs(model, batch=4, length=6)
    if given == "labels and inputs":  # as transformers' collator for these models gives them
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"].clone())
    sites = [site for site in find_sites(model, ("heads", "neurons")) if site.stack == "decoder"]
    entering: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(site.consumer).register_forward_pre_hook(  # type: ignore[arg-type]
            lambda module, args, name=site.name: entering.__setitem__(name, args[0].detach())
        )
        for site in sites
    ]
    with GramCollector(model, sites) as collector:
        output = model(**batch)
    for hook in hooks:
        hook.remove()
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    counted = gradient.abs().sum(-1) > 0
    assert 0 < int(counted.sum()) < counted.numel()
    for site in sites:
        assert collector.tokens[site.name] == int(counted.sum())
        rows = entering[site.name].reshape(*counted.shape, -1)[counted]
        torch.testing.assert_close(collector.moment(site.name), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "labels"),
    [(name, "none") for name in CLASSIFIERS]
    + [(name, labels) for name in ("bart", "mbart", "t5") for labels in ("classes", "several classes")],
)
def test_a_decoder_that_reads_the_shifted_input_counts_the_input_tokens(name: str, labels: str) -> None:
    """Labels of whole sequences say nothing about tokens: (batch,) classes, or (batch, classes) floats."""
    model = drawn(CLASSIFIERS[name])
    batch = inputs(model)
    del batch["labels"]
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(3), last] = 2  # the end token, where these heads read
    plain = dict(batch)
    if labels == "classes":
        batch["labels"] = torch.tensor([0, 2, 1])
    elif labels == "several classes":
        model.config.problem_type = "multi_label_classification"
        batch["labels"] = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    sites = list(find_sites(model, ("heads", "neurons")))
    with GramCollector(model, sites) as collector, torch.no_grad():
        model(**batch)
    assert set(collector.tokens.values()) == {int(batch["attention_mask"].sum())}
    rows = consumer_inputs(model, sites, [plain])
    for site in sites:
        x = rows[site.name]
        torch.testing.assert_close(collector.moment(site.name), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_a_decoder_alone_has_its_own_sites_and_says_what_did_not_run() -> None:
    whole = build("bart")
    alone = drawn(lambda: BartForCausalLM(BartConfig(**SEQ2SEQ)))
    sites = find_sites(alone)
    assert structure_digest(sites) == structure_digest(s for s in find_sites(whole) if s.stack == "decoder")
    batch = inputs(whole)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"'decoder\.0\.cross_attention'.*only with encoder_hidden_states"):
        extract(alone, measure="output-gram", calibration=[text])
    own = [site for site in sites if "cross" not in site.name]
    graph = extract(alone, measure="output-gram", calibration=[text], sites=own)
    assert len(graph.redundancy) == 2 * LAYERS
    memory = torch.randn(3, 5, HIDDEN)
    graph = extract(alone, measure="output-gram", calibration=[{**text, "encoder_hidden_states": memory}])
    assert len(graph.redundancy) == 3 * LAYERS


def test_query_key_and_value_of_an_image_model_may_lack_biases() -> None:
    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=NEURONS,
        image_size=8, patch_size=4, qkv_bias=False,
    )  # fmt: skip
    model = drawn(lambda: ViTModel(config))
    assert [piece.role for piece in find_sites(model, ("heads",))[0].slices] == ["q", "k", "v", "o"]
    plan = random_plan(model, kinds=(*ATTENTION, "neuron"))
    with apply(model, plan):
        smaller = compact(model, plan)
        batch = inputs(model)
        with torch.no_grad():
            torch.testing.assert_close(smaller(**batch).pooler_output, model(**batch).pooler_output)


# The whole path


@pytest.mark.parametrize("measure", measure_names())
def test_mbart_goes_the_whole_way(measure: str) -> None:
    model = mbart()
    before, batch = bits(model), inputs(model)
    calibration = [batch] if measure == "output-gram" else None
    graph = extract(model, measure=measure, calibration=calibration, include=("heads", "neurons"))
    plan = solve(graph, budget=0.5) | solve(graph, budget=0.5, problem="neurons")
    sites = find_sites(model, ("heads", "neurons"))
    assert structure_digest(sites) == structure_digest(find_sites(build("bart"), ("heads", "neurons")))
    for merge in ("none", "scale", "least-squares", "paper"):
        heads = plan if merge in ("none", "least-squares") else solve(graph, theta="auto:0.4")
        with apply(model, heads, merge=merge, calibration=[batch]):  # type: ignore[arg-type]
            smaller = compact(model, heads)
            with torch.no_grad():
                torch.testing.assert_close(smaller(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
        assert bits(model) == before


MERGED = [(name, merge) for name in FAMILIES for merge in ("none", "scale", "least-squares")] + [
    (name, "paper") for name in PAPER
]


@pytest.mark.parametrize(("family", "merge"), MERGED)
def test_a_merged_model_can_be_cut_under_the_open_handle(family: str, merge: Any) -> None:
    """compact never merges by itself: what it removes from the merged model is what the masks made zero."""
    model = build(family)
    dense, calibration = bits(model), [inputs(model, seed=1)]
    plan = random_plan(model, kinds=(*ATTENTION, "neuron"))
    batch = inputs(model)
    with torch.no_grad():
        with apply(model, plan):
            dropped = model(**batch).logits
        with apply(model, plan, merge=merge, calibration=calibration):
            smaller = compact(model, plan)
            masked = model(**batch).logits
            cut = smaller(**batch).logits
        after = smaller(**batch).logits  # the handle is closed: the copy shares nothing that was restored
    torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, cut) and bits(model) == dense
    assert (merge == "none") == torch.allclose(masked, dropped, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_families_without_the_papers_merge_are_those_whose_heads_do_not_fill_the_model() -> None:
    for name in FAMILIES:
        heads = find_sites(build(name), ("heads",))
        fits = all(site.n_units * site.unit_width == HIDDEN for site in heads)
        assert fits == (name in PAPER) == (name not in UNDEFINED_PAPER_MERGE)


@pytest.mark.parametrize("family", ["vit", "bart", "marian"])
def test_merges_that_cannot_be_carried_out_are_refused_untouched(family: str) -> None:
    model = build(family)
    plan = random_plan(model)
    bare = replace(
        plan, solutions={n: replace(s, dominator=None, dominator_distance=None) for n, s in plan.solutions.items()}
    )
    data = [inputs(model)]
    for merge in ("scale", "least-squares"):
        with untouched(model), pytest.raises(ValueError, match=f"merge '{merge}' needs calibration"):
            apply(model, plan, merge=merge)  # type: ignore[arg-type]
    for merge in ("scale", "paper"):
        with untouched(model), pytest.raises(ValueError, match=rf"merge '{merge}' needs dominators; the plan of 'enc"):
            apply(model, bare, merge=merge, calibration=data)  # type: ignore[arg-type]
    with untouched(model), pytest.raises(ValueError, match="unknown merge 'sum'; available: none, scale"):
        apply(model, plan, merge="sum", calibration=data)  # type: ignore[arg-type]


# Training


class Watch(TrainerCallback):
    """After every step masked weights are zero."""

    def __init__(self, pruning: TopoPruneCallback) -> None:
        self.pruning, self.steps = pruning, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.pruning.pruner is not None
        self.steps += 1
        for name, keep in self.pruning.pruner.handle.masks().items():
            assert (model.get_parameter(name)[~keep] == 0.0).all(), name


RECIPES = {
    "budget": Recipe.budget(0.5, solves=3, tokens_per_unit=2),
    "neuroprune": Recipe.neuroprune(0.1, 0.1, "auto:0.4"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["vit", "bart", "mbart"])
def test_one_callback_prunes_under_the_trainer(family: str, recipe: str, tmp_path: Path) -> None:
    model = mbart() if family == "mbart" else build(family)
    rows = batch_of(model, 0, batch=16)
    data = [{key: value[i] for key, value in rows.items()} for i in range(16)]
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=2e-3,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", eval_strategy="epoch", seed=5,
    )  # fmt: skip
    callback = TopoPruneCallback(RECIPES[recipe])
    watch = Watch(callback)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=[callback, watch])
    result = trainer.train()
    assert watch.steps == trainer.state.max_steps == 12
    assert torch.isfinite(torch.tensor(result.training_loss))
    sites = find_sites(model)
    figures = measure_sparsity(model, sites)
    assert callback.pruner is not None
    pruned = {name for name, solution in callback.pruner.plan.unit_solutions().items() if not solution.keep.all()}
    stacks = {site.stack for site in sites if site.name in pruned}
    assert stacks == ({"encoder"} if family == "vit" else {"encoder", "decoder"})
    if recipe == "budget":
        largest = max(site.matrix_parameters_per_unit for site in sites if site.kind != "input_dim")
        assert abs(figures.removable - 0.5) * matrix_parameters(sites) <= largest
    else:
        assert figures.zeros > 0.1
    batch = {key: value.to(model.device) for key, value in rows.items()}
    smaller = compact(model.eval(), callback.pruner.plan, gather="never")
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
