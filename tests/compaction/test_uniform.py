"""`export(uniform=True)`: stock transformers, without topoprune, computes what the compacted model computes."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from tests.compaction.cases import EMPTY, GENERATING, empty_plan, structure_plan
from tests.compaction.filetools import content, outputs, state
from tests.compaction.laws import plan_of
from tests.tiny import FAMILIES, HEADS, LAYERS, NEURONS, SEQ2SEQ, build, inputs
from topoprune import Plan, Site, TensorSlice, compact, export, find_sites, kept_units, load, save
from topoprune.compaction import UniformShape, modeling_topoprune, uniform_shape
from topoprune.compaction.uniform import uniform_model
from topoprune_solvers import Solution, Status

FREE_HEADS = ("t5", "t5-gated", "llama", "qwen2", "qwen3", "vit")
CASES = [(family, case) for family in FAMILIES for case in ("gathered", "nothing in the last layer")]


def dense(family: str, seed: int = 0) -> Any:
    """A tiny model whose position tables are those that transformers computes and never stores."""
    return copy.deepcopy(_dense(family, seed))


@cache
def _dense(family: str, seed: int) -> Any:
    model: Any = build(family, seed)
    names = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) & {name for name, _ in model.named_parameters()}
    if names:
        fresh = type(model)(model.config)
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).copy_(fresh.get_parameter(name))
    return model


def uneven(model: Any, seed: int = 0, inputs_too: bool = False) -> Plan:
    """Any number of units stays in each site, none too; the second layers of the stacks keep some."""
    rng = np.random.default_rng(seed)
    keeps = {}
    for site in find_sites(model):
        if site.kind == "input_dim" and not inputs_too:
            continue
        kept = int(rng.integers(site.kind == "input_dim" or site.layer > 0, site.n_units + 1))
        keeps[site.name] = rng.permutation(np.arange(site.n_units) < kept)
    return plan_of(model, keeps)


def compacted(family: str, case: str = "uneven", seed: int = 0) -> Any:
    model = dense(family, seed)
    if case in EMPTY:
        return compact(model, empty_plan(model, EMPTY[case], seed=seed))
    return compact(model, uneven(model, seed, case == "gathered"), gather="always")


def prompt(model: Any) -> torch.Tensor:
    return torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(3))


# -- one process without topoprune -----------------------------------------------------------------

STOCK = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("topoprune", "topoprune_solvers"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.utils.logging.disable_progress_bar()
for folder in sys.argv[1:]:
    name = json.load(open(folder + "/config.json"))["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    given = load_file(folder + ".inputs")
    prompt = given.pop("prompt")
    with torch.no_grad():
        found = {"logits": model(**given).logits.contiguous()}
        if model.can_generate():
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=5)
            found["tokens"] = tokens.contiguous()
    missing = [key for key in info["missing_keys"] if not any(key in k for k in model._keys_to_ignore_on_save or ())]
    assert not missing, missing
    save_file(found, folder + ".outputs")
assert not any(module.split(".")[0] == "topoprune" for module in sys.modules)
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, Path]]:
    """Compacted model and export of every case; stock transformers has run them all in one process."""
    place = tmp_path_factory.mktemp("uniform")
    made = {}
    for family, case in CASES:
        model = compacted(family, case)
        folder = export(model, place / f"{family} {case}", uniform=True)
        given = inputs(model) | {"prompt": prompt(model)}
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, f"{folder}.inputs")
        made[family, case] = model, folder
    folders = [str(folder) for _, folder in made.values()]
    run = subprocess.run([sys.executable, "-c", STOCK, *folders], cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return made


@pytest.mark.parametrize(("family", "case"), CASES)
def test_stock_transformers_computes_the_same_without_topoprune(stock: Any, family: str, case: str) -> None:
    model, folder = stock[family, case]
    found = load_file(f"{folder}.outputs")
    torch.testing.assert_close(found["logits"], outputs(model), rtol=1e-4, atol=3e-5)
    if family in GENERATING:
        ids = prompt(model)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        assert torch.equal(found["tokens"], tokens)
    else:
        assert "tokens" not in found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_an_ordinary_one(stock: Any, family: str) -> None:
    _, folder = stock[family, "gathered"]
    expected = {"config.json", "model.safetensors"} | ({"generation_config.json"} if family in GENERATING else set())
    assert set(content(folder)) == expected
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(dense(family)).__name__]
    assert not {"topoprune", "auto_map", "per_layer_config", "_name_or_path"} & set(config)
    assert str(folder.parent) not in json.dumps(config)


# -- which shape -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["uneven", "no neurons"])
def test_ffn_widths_are_those_of_the_widest_layer(family: str, case: str) -> None:
    model = compacted(family, case, seed=2)
    shape = uniform_shape(model)
    kept = {name: units.size for name, units in kept_units(model).items()}
    ffn = {site.name: site.stack for site in find_sites(dense(family)) if site.kind == "neuron"}
    for name, value in shape.config.items():
        if name not in ("d_ff", "n_inner", "intermediate_size", "hidden_dim") and not name.endswith("ffn_dim"):
            continue
        stack = name.removesuffix("_ffn_dim")
        own = [kept.get(site, NEURONS) for site, where in ffn.items() if where == stack or stack == name]
        assert value == max(1, *own)
        assert shape.dense[name] == NEURONS


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FREE_HEADS])
def test_heads_lie_in_their_old_places_where_the_head_width_follows_their_number(family: str) -> None:
    model = compacted(family)
    stock, shape = uniform_model(model)
    heads = [value for name, value in shape.config.items() if name.endswith("heads")]
    assert heads and set(heads) == {HEADS}
    original = dict(dense(family).named_parameters())
    kept = kept_units(model)
    for site in find_sites(stock, include=("heads",)):
        stays = np.isin(np.arange(HEADS), kept.get(site.name, np.arange(HEADS)))
        for piece in site.slices:
            for head in range(HEADS):
                index = torch.from_numpy(piece.indices(np.array([head])))
                there = stock.get_parameter(piece.param).index_select(piece.axis, index)
                was = original[piece.param].index_select(piece.axis, index)
                assert torch.equal(there, was if stays[head] else torch.zeros_like(was)), (piece.param, head)


@pytest.mark.parametrize("seed", range(4))
def test_t5_has_as_many_heads_as_read_different_columns_of_the_shared_bias(seed: int) -> None:
    model = compacted("t5", seed=seed)
    kept = {site.name: np.arange(HEADS) for site in find_sites(dense("t5"), include=("heads",))} | kept_units(model)
    unions = [
        np.unique(np.concatenate([kept[f"{stack}.{layer}.attention"] for layer in range(LAYERS)])).size
        for stack in ("encoder", "decoder")
    ]
    cross = [kept[f"decoder.{layer}.cross_attention"].size for layer in range(LAYERS)]
    assert uniform_shape(model).config["num_heads"] == max(1, *unions, *cross)


@pytest.mark.parametrize("counts", [(0, 3), (1, 2), (3, 3), (0, 0), (5, 1)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_kv_groups_are_the_fewest_that_transformers_accepts(family: str, counts: tuple[int, int]) -> None:
    model = grouped(family, heads=12, kv_heads=6)
    plan = plan_of(model, {f"decoder.{layer}.attention": kept for layer, kept in enumerate(counts)})
    shape = uniform_shape(compact(model, plan))
    accepted = [n for n in range(max(1, *counts), 7) if family != "llama" or model.config.hidden_size % (2 * n) == 0]
    assert shape.config["num_key_value_heads"] == accepted[0]
    assert shape.config["num_attention_heads"] == (2 * accepted[0] if any(counts) else 1)


def grouped(family: str, heads: int, kv_heads: int, seed: int = 0) -> Any:
    """A tiny model with that many heads of width 4."""
    model: Any = dense(family, seed)
    config = type(model.config).from_dict(
        model.config.to_dict() | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 4}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(model)(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.3, 0.6, 0.9]))
def test_unequal_query_heads_per_group_fit_and_never_take_more_than_the_dense_shape(seed: int, share: float) -> None:
    model = grouped("llama", heads=8, kv_heads=2, seed=seed)
    rng = np.random.default_rng(seed)
    sites = find_sites(model, include=("heads",), gqa="any-query-heads")
    solutions = {}
    for site in sites:
        keep = rng.random(site.n_units) < share
        solutions[site.name] = Solution(keep, float(keep.sum()), "min", Status.FEASIBLE, "test")
    smaller: Any = compact(model, Plan(sites, solutions), duplicate_kv=True)
    stock, shape = uniform_model(smaller)
    torch.testing.assert_close(outputs(stock), outputs(smaller), rtol=1e-4, atol=3e-5)
    assert shape.parameters <= uniform_shape(model).parameters
    assert shape.config["num_attention_heads"] % shape.config["num_key_value_heads"] == 0


@settings(max_examples=15, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**16))
def test_the_shape_says_what_comes_out(family: str, seed: int) -> None:
    model = compacted(family, seed=seed)
    before, noise = state(model), torch.get_rng_state()
    shape = uniform_shape(model)
    stock, again = uniform_model(model)
    assert state(model) == before and torch.equal(torch.get_rng_state(), noise) and shape == again
    assert shape.parameters == sum(p.numel() for p in stock.parameters())
    real = shape.parameters - shape.padding
    compact_size = sum(p.numel() for p in model.parameters())
    # T5: a compacted model keeps columns of the position bias that no head reads any more
    assert real <= compact_size if family.startswith("t5") else real == compact_size
    assert 0 <= shape.padding_share < 1 and f"{shape.parameters:,}" in str(shape)
    assert all(getattr(stock.config, name) == value for name, value in shape.config.items())
    assert all(shape.config[name] <= value for name, value in shape.dense.items())
    torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_keeps_its_shape_and_every_bit(family: str, tmp_path: Path) -> None:
    model = dense(family)
    shape = uniform_shape(model)
    assert shape.config == shape.dense and shape.padding == 0
    again = type(model).from_pretrained(export(model, tmp_path / "stock", uniform=True))
    assert state(again) == state(model)


# -- what else a folder has to keep ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied"),
    # encoder-decoders are always tied
    [*((family, True) for family in GENERATING), *((family, False) for family in ("opt", "llama", "qwen2", "gpt2"))],
)
def test_embeddings_stay_tied_or_apart(family: str, tied: bool, tmp_path: Path) -> None:
    config = dense(family).config
    config.tie_word_embeddings = tied
    model = type(dense(family))(config).eval()
    smaller = compact(model, structure_plan(model))
    stock = type(model).from_pretrained(export(smaller, tmp_path / "stock", uniform=True))
    assert (stock.get_output_embeddings().weight is stock.get_input_embeddings().weight) == tied
    torch.testing.assert_close(outputs(stock), outputs(smaller), rtol=1e-4, atol=3e-5)


def test_dtype_and_generation_settings_travel(tmp_path: Path) -> None:
    model = compacted("opt").bfloat16()
    model.generation_config.max_new_tokens = 17
    stock = type(dense("opt")).from_pretrained(export(model, tmp_path / "stock", uniform=True))
    assert stock.dtype == torch.bfloat16 and stock.generation_config.max_new_tokens == 17
    assert state(stock) == state(uniform_model(model)[0])


@pytest.mark.parametrize("family", ["t5", "llama", "bert"])
def test_saved_reloaded_and_pruned_again(family: str, tmp_path: Path) -> None:
    model = load(save(compacted(family), None, tmp_path / "saved"))
    again = compact(model, uneven(model, seed=5))
    stock, _ = uniform_model(again)
    torch.testing.assert_close(outputs(stock), outputs(again), rtol=1e-4, atol=3e-5)


def test_a_model_built_by_the_code_of_a_folder() -> None:
    spec: Any = importlib.util.spec_from_file_location("modeling_elsewhere", modeling_topoprune.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    ours = compacted("t5", "no heads in the first layer")
    theirs = elsewhere.compact_class(type(dense("t5")))(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    stock, shape = uniform_model(theirs)
    assert type(stock) is type(dense("t5")) and shape == uniform_shape(ours)
    assert {type(m).__module__.split(".")[0] for m in stock.modules()} <= {"torch", "transformers"}
    torch.testing.assert_close(outputs(stock), outputs(ours), rtol=1e-4, atol=3e-5)


def test_a_saved_folder_becomes_a_stock_one_and_keeps_its_tokenizer(tmp_path: Path) -> None:
    model = compacted("bert")
    folder = save(model, None, tmp_path / "model", card=False)
    (folder / "tokenizer.json").write_text("{}")
    assert export(model, folder, uniform=True) == folder
    assert set(content(folder)) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    model = BertModel(dense("bert").config, add_pooling_layer=False).eval()
    smaller = compact(model, structure_plan(model))
    again = BertModel.from_pretrained(export(smaller, tmp_path / "stock", uniform=True), add_pooling_layer=False)
    given = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**given)[0], smaller(**given)[0], rtol=1e-4, atol=3e-5)


def test_sharded(tmp_path: Path) -> None:
    model = compacted("bert")
    folder = export(model, tmp_path / "stock", uniform=True, max_shard_size=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = type(dense("bert")).from_pretrained(folder)
    assert state(again) == state(uniform_model(model)[0])


# -- refusals --------------------------------------------------------------------------------------


def assert_refused(model: Any, place: Path, match: str, **options: Any) -> None:
    """The error says so, and nothing is there that was not there before."""
    before = content(place)
    with pytest.raises(ValueError, match=match):
        export(model, place / "out", **{"uniform": True} | options)
    assert content(place) == before and not (place / "out").exists()


def test_what_cannot_be_said_is_refused(tmp_path: Path) -> None:
    class Mine(BertModel):
        pass

    config = BertConfig(**{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8})
    assert_refused(Mine(config), tmp_path, "Mine is not a class of transformers")
    assert_refused(torch.nn.Linear(2, 2), tmp_path, "Linear is not a class of transformers")
    handmade = compacted("bert")
    handmade.config.topoprune["sites"]["mine"] = handmade.config.topoprune["sites"]["encoder.1.ffn"]
    assert_refused(handmade, tmp_path, "site 'mine' was made by hand")
    sliced = dense("bert")
    sliced.bert.encoder.layer[0].intermediate.dense = torch.nn.Linear(24, 7)
    assert_refused(sliced, tmp_path, "already pruned")
    with torch.device("meta"):
        assert_refused(BertModel(config), tmp_path, "off memory")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "embedding_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ElectraModel(ElectraConfig(vocab_size=8, intermediate_size=NEURONS, **sizes))
    assert_refused(model, tmp_path, "no adapter.*electra")
    # Made by hand, its neurons can be removed; how to say that in its config is not known.
    prefix = "encoder.layer.0"
    site = Site(
        name="mine",
        kind="neuron",
        n_units=NEURONS,
        unit_width=1,
        reads=(
            TensorSlice(f"{prefix}.intermediate.dense.weight", 0, "in", (NEURONS, 8)),
            TensorSlice(f"{prefix}.intermediate.dense.bias", 0, "in_bias", (NEURONS,)),
        ),
        writes=(TensorSlice(f"{prefix}.output.dense.weight", 1, "out", (8, NEURONS)),),
        consumer=f"{prefix}.output.dense",
        block="ffn",
    )
    keep = np.arange(NEURONS) < 10
    plan = Plan((site,), {"mine": Solution(keep, 10.0, "min", Status.FEASIBLE, "test")})
    assert_refused(compact(model, plan), tmp_path, "no adapter.*electra")


def test_options_of_the_other_format_are_refused(tmp_path: Path) -> None:
    model = dense("bert")
    assert_refused(model, tmp_path, "pass uniform=True", uniform=False)
    assert_refused(model, tmp_path, "unknown format 'gguf'", format="gguf")
    assert_refused(model, tmp_path, "opset=17 is an option of ONNX files", opset=17)
    assert_refused(model, tmp_path, "exporter='dynamo' is an option of ONNX", exporter="dynamo")
    assert_refused(model, tmp_path, "max_shard_size=9 is an option of transformers", format="onnx", max_shard_size=9)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no model"):
        export(dense("bert"), tmp_path, uniform=True)
    assert content(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("family", ["bart", "bert"])
def test_a_failed_write_leaves_the_old_folder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(dense(family), tmp_path / "stock", uniform=True)
    before = content(tmp_path)

    def broken(self: Any, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(dense(family)), "save_pretrained", broken)
    with pytest.raises(OSError, match="no space"):
        export(compacted(family), folder, uniform=True)
    assert content(tmp_path) == before


def test_the_shape_is_a_value() -> None:
    shape = uniform_shape(compacted("bart"))
    assert isinstance(shape, UniformShape)
    assert set(shape.config) == {key for key in SEQ2SEQ if key.endswith(("_ffn_dim", "_attention_heads"))}
