"""The record of a run: figures by hand, masked and cut out alike, over a resume, as a table and a picture."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests.masktools import ATTENTION, bits
from tests.prunertools import adamw, batch_of, train
from tests.tiny import FAMILIES, build
from tests.training.steady import still
from topoprune import Pruner, Recipe, connectivity_sd, find_sites
from topoprune.cli.app import app
from topoprune.extraction import collect_gram
from topoprune.sparsity import degrees, row_view
from topoprune.tasks.paper_figures import draw_history, history_data, history_table, write_history
from topoprune.train.record import HeadSite, RunRecord, StepRecord

every_family = pytest.mark.parametrize("family", FAMILIES)


def run(family: str, recipe: Any = None, steps: int = 6, seed: int = 0, **more: Any) -> tuple[nn.Module, Pruner]:
    model = still(build(family, seed))
    torch.manual_seed(seed)
    optimizer = adamw(model)
    recipe = recipe or Recipe.budget(0.5, ramp=(0.3, 0.7), solves=2)
    pruner = Pruner(model, recipe, total_steps=steps, steps_per_epoch=2, seed=seed, **more).attach(optimizer)
    train(model, optimizer, range(steps))
    return model, pruner


def naive_importance(model: nn.Module, site: Any, head: int) -> float:
    piece = site.writes[0]
    rows = row_view(model.get_parameter(piece.param).detach(), piece.axis)
    return float(rows[head * piece.width : (head + 1) * piece.width].abs().mean())


@every_family
def test_every_decision_is_recorded_as_it_was(family: str) -> None:
    model = build(family)
    optimizer = adamw(model)
    recipe = Recipe.budget(0.6, ramp=(0.2, 0.8), solves=3, repair="none")
    pruner = Pruner(model, recipe, total_steps=10).attach(optimizer)
    heads = [site for site in find_sites(model) if site.kind in ATTENTION]
    kept_before = {site.name: set(range(site.n_units)) for site in heads}
    seen: list[int] = []

    def look(event: Any) -> None:
        seen.append(event.step)
        record = pruner.records[-1]
        assert (record.step, record.zeros, record.removable) == (event.step, event.zeros, event.removable)
        for site in heads:
            stays = set(np.flatnonzero(pruner.plan.keep(site.name)).tolist())
            assert set(record.removed.get(site.name, ())) == kept_before[site.name] - stays
            assert record.kept[site.name] == len(stays)
            energy = record.energy.get(site.name)
            for head, worth in enumerate(record.importance[site.name]):
                assert (worth is None) == (head not in kept_before[site.name])
                assert energy is None or (energy[head] is None) == (worth is None)
                if head in stays:  # without repair, what stays is what it was
                    assert worth == pytest.approx(naive_importance(model, site, head), rel=1e-5)
            kept_before[site.name] = stays
        assert record.connectivity_sd == pytest.approx(connectivity_sd(model, find_sites(model)))

    pruner.on_solve = look
    assert pruner.records[0].zeros == 0 and pruner.records[0].step == 0 and not pruner.records[0].removed
    train(model, optimizer, range(10))
    assert seen == [2, 5, 8] == [record.step for record in pruner.records[1:]]
    assert any(record.energy for record in pruner.records)
    summary = RunRecord.of(pruner, "x")
    assert summary.steps[-1].step == 10  # the end of training
    for site in heads:
        assert np.array_equal(summary.gone()[site.name], ~pruner.plan.keep(site.name))


def test_energy_is_the_diagonal_of_the_output_gram() -> None:
    """One decision over all tokens of three batches, with lr 0: what a pass over the same batches measures."""
    model = still(build("bert"))
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    recipe = Recipe.budget(heads=4, ramp=(0.3, 0.3), solves=1, tokens_per_unit=1000)
    pruner = Pruner(model, recipe, total_steps=10).attach(optimizer)
    train(model, optimizer, range(3))
    batches = [{k: v for k, v in batch_of(model, step).items() if k != "labels"} for step in range(3)]
    sites = find_sites(before, include=("heads",))
    for name, moment in collect_gram(before, sites, batches):
        site = next(s for s in sites if s.name == name)
        weight = before.get_parameter(site.writes[0].param).detach()
        for head, energy in enumerate(pruner.records[-1].energy[name]):
            part = slice(6 * head, 6 * head + 6)
            wanted = torch.einsum("oi,ij,oj->", weight[:, part], moment[part, part], weight[:, part])
            assert energy == pytest.approx(float(wanted), rel=1e-4)


@every_family
@pytest.mark.parametrize("kind", ["neuron", "input_dim"])
def test_degrees_are_counted_row_by_row(family: str, kind: Any) -> None:
    model = build(family)
    found = degrees(model, find_sites(model), 0.2, kind=kind)
    assert set(found) == {site.name for site in find_sites(model) if site.kind == kind}
    for site in find_sites(model):
        if site.kind != kind:
            continue
        reads = [
            row_view(model.get_parameter(name).detach(), axis)
            for name, axis in dict.fromkeys((p.param, p.axis) for p in site.reads if len(p.shape) == 2)
        ]
        rows = [torch.cat(reads, dim=1)]
        if kind == "neuron":
            rows.append(row_view(model.get_parameter(site.writes[0].param).detach(), 1 - site.writes[0].axis))
        wanted = [100 * float((row.abs() >= 0.2).sum()) / row.numel() for matrix in rows for row in matrix]
        torch.testing.assert_close(found[site.name], torch.tensor(wanted))


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2", "bart"])
def test_what_is_cut_out_counts_as_missing_links(family: str) -> None:
    (_, masked), (_, cut) = run(family), run(family, compact=True)
    assert len(masked.records) == len(cut.records) > 2
    for a, b in zip(masked.records, cut.records, strict=True):
        assert (a.step, a.kept, a.removed) == (b.step, b.kept, b.removed)
        for name in ("zeros", "removable", "connectivity_sd", "attention_sd"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3, abs=1e-3), name
        for site, values in a.importance.items():
            assert values == [None if v is None else pytest.approx(v, rel=1e-3) for v in b.importance[site]]
    assert masked.measure().connectivity_sd == pytest.approx(cut.measure().connectivity_sd, rel=1e-3)  # type: ignore[arg-type]


def test_a_resumed_run_has_the_record_of_the_whole_one() -> None:
    model = build("bert")
    torch.manual_seed(0)
    optimizer = adamw(model)
    recipe = Recipe.budget(0.5, ramp=(0.2, 0.8), solves=3)
    pruner = Pruner(model, recipe, total_steps=8).attach(optimizer)
    saved: list[Any] = []

    def save(step: int) -> None:
        if step == 3:
            states = model.state_dict(), optimizer.state_dict(), pruner.state_dict(), torch.get_rng_state()
            saved.extend(copy.deepcopy(states))

    train(model, optimizer, range(8), save)
    again = build("bert", seed=5)
    optimizer = adamw(again)
    resumed = Pruner(again, recipe, total_steps=8).attach(optimizer)
    resumed.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[3])
    train(again, optimizer, range(4, 8))
    assert bits(again) == bits(model)
    assert RunRecord.of(resumed) == RunRecord.of(pruner)
    old = {name: value for name, value in saved[2].items() if name != "records"}
    earlier = Pruner(build("bert"), recipe, total_steps=8, resume=old)  # of a version that kept no record
    assert [step.step for step in RunRecord.of(earlier).steps] == [4]


def test_records_survive_their_file_and_say_what_is_wrong_with_it(tmp_path: Path) -> None:
    record = RunRecord.of(run("t5")[1], "t5")
    assert record.save(tmp_path) == tmp_path / "history.json"
    assert RunRecord.load(tmp_path) == RunRecord.load(tmp_path / "history.json")
    again = RunRecord.load(tmp_path)
    assert again.steps == record.steps and again.sites == record.sites and again.recipe["sparsity"] == 0.5
    with pytest.raises(FileNotFoundError, match=r"no history.json at .*; expected the folder of a pruned run"):
        RunRecord.load(tmp_path / "nowhere")
    for damage, wanted in (
        ("{", "not a readable record"),
        ('{"format": "x"}', "it holds a 'x'"),
        (json.dumps({**record.to_dict(), "schema_version": 9}), "schema version 9 is newer"),
        ("[]", "not a readable record"),
    ):
        (tmp_path / "history.json").write_text(damage)
        with pytest.raises(ValueError, match=wanted):
            RunRecord.load(tmp_path)


def made(name: str, gone: list[int], importance: list[float]) -> RunRecord:
    sites = (HeadSite("encoder.0.attention", "encoder", 0, "attention", 4),)
    start = StepRecord(0, 0.0, 0.0, 0.0, 1.0, None, {"encoder.0.attention": 4})
    end = StepRecord(
        5, 0.5, 0.4, 0.0, 12.0, 8.0, {"encoder.0.attention": 4 - len(gone)}, {"encoder.0.attention": gone}, {},
        {"encoder.0.attention": importance},
    )  # fmt: skip
    return RunRecord(name, {}, 0, sites, (start, end))


def test_the_four_figures_as_numbers() -> None:
    runs = [made("a", [0, 1], [2.0, 4.0, 1.0, 3.0]), made("b", [1], [1.0, 1.0, 1.0, 1.0]), made("c", [], [1.0] * 4)]
    data = history_data(runs)
    assert data["lost"] == {"encoder.0.attention": [2, 1, 0]}
    assert data["frequency"]["encoder.0.attention"] == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert data["removed_importance"]["encoder.0.attention"] == pytest.approx((2 + 4 + 1) / 3)
    assert data["kept_importance"]["encoder.0.attention"] == pytest.approx((1 + 3 + 1 + 1 + 1) / 5)
    assert [run["importance_ratio"] for run in data["runs"][:2]] == pytest.approx([1.5, 1.0])
    assert math.isnan(data["runs"][2]["importance_ratio"])
    assert data["runs"][0]["connectivity_sd"] == [1.0, 12.0] and data["runs"][0]["attention_sd"] == [None, 8.0]
    with pytest.raises(ValueError, match="no run to show"):
        history_data([])
    with pytest.raises(ValueError, match="'d' is of a model with other attention layers than 'a'"):
        history_data([runs[0], RunRecord("d", {}, 0, (), runs[0].steps)])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [made("a", [0, 1], [2.0, 4.0, 1.0, 3.0]), made("b", [], [1.0, 1.0, 1.0, 1.0])]
    for several in (runs, runs[:1], runs[1:]):
        file = draw_history(several, tmp_path / f"x.{suffix}", title="two runs")
        assert file.stat().st_size > 10_000
    with pytest.raises(ValueError, match="expected a name that ends in"):
        draw_history(runs, tmp_path / "x.bmp")


def test_the_command_shows_draws_and_writes(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        files = write_history(RunRecord.of(run("bart", seed=seed)[1], f"seed {seed}"), tmp_path / str(seed))
        assert set(files) >= {"history"} and all(Path(file).is_file() for file in files.values())
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    shown = CliRunner().invoke(app, ["history", *folders, "--out", str(tmp_path / "both.svg")])
    assert shown.exit_code == 0, shown.output
    assert "seed 1" in shown.output and "of 24" in shown.output and "both.svg" in shown.output
    printed = CliRunner().invoke(app, ["history", *folders, "--json", "-"])
    data = json.loads(printed.stdout)
    assert [run["name"] for run in data["runs"]] == ["seed 0", "seed 1"]
    assert set(data["frequency"]) == set(data["layers"]) and len(data["layers"]) == 6
    assert all(0 <= share <= 1 for shares in data["frequency"].values() for share in shares)
    for words, wanted in (([str(tmp_path)], "no history.json at"), ([*folders, "--out", "x.bmp"], "cannot draw x.bmp")):
        failed = CliRunner().invoke(app, ["history", *words])
        assert failed.exit_code == 2 and wanted in failed.output
    assert history_table([RunRecord.load(folders[0])]).row_count == len(RunRecord.load(folders[0]).steps)
