"""A compacted model is copied, pickled, moved, loaded, compiled and exported like any other module."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.compaction.laws import assert_same_function
from tests.masktools import bits, logits, random_plan
from tests.tiny import FAMILIES, build, inputs
from topoprune import Plan, compact, find_sites, kept_units
from topoprune_solvers import Solution, Status


def _cut(family: str) -> nn.Module:
    """No heads in the first layer and no neurons in the last one of a stack, gathers, and half of the rest."""
    model = build(family)
    plan = random_plan(model, 0.5)
    solutions = dict(plan.solutions)
    for site in plan.sites:
        if (
            (site.kind == "neuron") == (site.layer == 1)
            and site.kind != "input_dim"
            and site.block != "cross_attention"
        ):
            solutions[site.name] = Solution(np.zeros(site.n_units, dtype=bool), 0.0, "min", Status.FEASIBLE, "test")
    return compact(model, Plan(plan.sites, solutions), gather="always")


def _arguments(model: nn.Module, **size: int) -> dict[str, Any]:
    """Tensors that give logits and no cache."""
    batch = {name: value for name, value in inputs(model, **size).items() if name != "labels"}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5].clone()
    if "input_ids" in batch and not type(model).__name__.endswith("Classification"):
        batch["use_cache"] = False
    return batch


class _Logits(nn.Module):
    """The model with one tensor as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> torch.Tensor:
        result: torch.Tensor = self.model(**arguments).logits
        return result


def _assert_same_model(one: nn.Module, other: nn.Module) -> None:
    assert type(one) is type(other)
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert bits(one) == bits(other)
    assert torch.equal(logits(one), logits(other))
    assert {n: u.tolist() for n, u in kept_units(one).items()} == {n: u.tolist() for n, u in kept_units(other).items()}
    assert find_sites(one) == find_sites(other)


# -- copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_are_the_same_model(family: str) -> None:
    model = _cut(family)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        _assert_same_model(again, model)
    part = next(m for m in model.modules() if type(m).__mro__[1].__name__ in ("NoHeads", "BiasOfKeptHeads"))
    assert type(copy.deepcopy(part)) is type(part)


_LOAD = """
import sys
from pathlib import Path
import torch
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    model, batch = torch.load(file, weights_only=False)
    with torch.no_grad():
        out = model(**batch).logits
    torch.save((type(model).__name__, out), file.with_suffix(".out"))
"""


@pytest.fixture(scope="module")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every family's pickled model computes in a fresh process."""
    folder = tmp_path_factory.mktemp("pickles")
    for family in FAMILIES:
        model = _cut(family)
        torch.save((model, inputs(model)), folder / f"{family}.pt")
    subprocess.run([sys.executable, "-c", _LOAD, str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_reads_the_pickle(family: str, _elsewhere: Path) -> None:
    model = _cut(family)
    name, out = torch.load(_elsewhere / f"{family}.out")
    assert name == type(model).__name__
    assert torch.equal(out, logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_fits_a_model_built_from_the_config(family: str) -> None:
    model = _cut(family)
    fresh = type(model)(copy.deepcopy(model.config)).eval()
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    fresh.load_state_dict(model.state_dict())
    _assert_same_model(fresh, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compacted_model_changes_its_type_as_a_whole(family: str) -> None:
    model = _cut(family)
    wide = copy.deepcopy(model).to(torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert {n: b.tolist() for n, b in wide.named_buffers() if "kept_" in n} == {
        n: b.tolist() for n, b in model.named_buffers() if "kept_" in n
    }
    assert_same_function(model, logits(wide).float())
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half).isfinite().all()
    on_meta = copy.deepcopy(model).to("meta")
    assert {t.device.type for t in [*on_meta.parameters(), *on_meta.buffers()]} == {"meta"}


# -- compilers ---------------------------------------------------------------------------------------------


# Slow: the same code paths as in a family that is not.
TWINS = ("roberta", "t5-gated", "qwen2", "marian")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in TWINS)) for f in FAMILIES])
def test_torch_export(family: str) -> None:
    model = _cut(family)
    batch = _arguments(model)
    program = torch.export.export(_Logits(model), (), kwargs=batch, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**batch), model(**batch).logits)


class _Text(nn.Module):
    """The logits of a text model: torch.export names dynamic axes by the arguments of forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return result


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_torch_export_with_dynamic_batch_and_length(family: str) -> None:
    model = _cut(family)
    model.config.use_cache = False
    axes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("length", min=2, max=32)}
    shapes = {"input_ids": axes, "attention_mask": axes}
    program = torch.export.export(_Text(model), (), inputs(model), dynamic_shapes=shapes, strict=False)
    other = inputs(model, batch=5, length=11)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**other), model(**other).logits)


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "llama", "t5", "bart")]


@pytest.mark.parametrize("family", ["bert", *SLOW])
def test_torch_compile_traces_the_whole_graph(family: str) -> None:
    torch.compiler.reset()
    model = _cut(family)
    batch = _arguments(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.slow
def test_torch_compile_to_machine_code() -> None:
    torch.compiler.reset()
    model = _cut("bert")
    batch = _arguments(model)
    compiled = torch.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=3e-5)


def test_a_compiled_model_is_pickled_without_its_compiled_code() -> None:
    torch.compiler.reset()
    model = _cut("bert")
    expected = logits(model)
    model.compile(backend="eager")
    assert model._compiled_call_impl is not None
    again = pickle.loads(pickle.dumps(model))
    assert again._compiled_call_impl is None
    assert torch.equal(logits(again), expected)
    assert copy.deepcopy(model)._compiled_call_impl is None
    # And it can be pruned on as it is.
    assert_same_function(compact(model), expected)
