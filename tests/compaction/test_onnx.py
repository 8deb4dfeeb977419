"""ONNX files: onnxruntime computes what the compacted model computes, at any batch size and length."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertModel, T5EncoderModel

from tests.compaction.cases import EMPTY, empty_plan, structure_plan
from tests.compaction.filetools import content, state
from tests.compaction.laws import plan_of
from tests.tiny import FAMILIES, VOCAB, build, drawn, inputs
from topoprune import compact, export, find_sites
from topoprune.compaction import onnx_export

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

# Batch, length, padding at the beginning; none is the shape that is traced.
SHAPES = ((1, 1, False), (1, 12, False), (5, 3, False), (3, 8, True))


def slow_but(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in FAMILIES]


def batch_of(model: Any, batch: int, length: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Inputs with padding at the end, or at the beginning."""
    given = inputs(model, batch, length, seed=7)
    if "labels" in given:
        given["decoder_input_ids"] = given.pop("labels").clamp(min=0)
    if left and "input_ids" in given:
        given["input_ids"] = given["input_ids"].flip(1)
        given["attention_mask"] = given["attention_mask"].flip(1)
    if getattr(model.config, "type_vocab_size", 1) > 1 and "input_ids" in given:
        given["token_type_ids"] = (given["input_ids"] % 2).long()
    return given


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(session: Any, given: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    found = session.run(list(names) or ["logits"], {name: tensor.numpy() for name, tensor in given.items()})
    return [torch.from_numpy(array) for array in found]


def assert_same(path: Path, model: Any) -> None:
    """Equal outputs at every shape; with padding at the beginning, where tokens are real."""
    session = session_of(path)
    for batch, length, left in SHAPES:
        given = batch_of(model, batch, length, left)
        with torch.no_grad():
            expected = model(**given).logits
        (found,) = run(session, given)
        if left and "decoder_input_ids" not in given and expected.ndim == 3:
            real = given["attention_mask"].bool()
            found, expected = found[real], expected[real]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def one_layer(family: str) -> Any:
    """A tiny model with one layer a stack: tracing takes seconds a layer."""
    model: Any = build(family)
    config = copy.deepcopy(model.config)
    for name in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, 1)
    return drawn(lambda: type(model)(config))


def half(model: Any) -> Any:
    return compact(model, structure_plan(model))


# -- every family, both exporters ------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_torchscript(family: str, tmp_path: Path) -> None:
    dense = build(family)
    model = compact(dense, empty_plan(dense, EMPTY["nothing in the last layer"]))
    path = export(model, tmp_path / "model.onnx", exporter="torchscript")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert_same(path, model)
    session = session_of(path)
    assert {value.name: value.shape for value in session.get_inputs()} == {
        name: axes_of(name, tensor) for name, tensor in batch_of(model, 2, 6).items()
    }
    assert [value.name for value in session.get_outputs()] == ["logits"]


def axes_of(name: str, tensor: torch.Tensor) -> list[Any]:
    if name == "pixel_values":
        return ["batch", *tensor.shape[1:]]
    return ["batch", "target_length" if name == "decoder_input_ids" else "length"]


@pytest.mark.parametrize("family", slow_but(("bert", "t5", "gpt2")))
def test_models_without_any_units_keep_their_inputs(family: str, tmp_path: Path) -> None:
    dense = build(family)
    model = compact(dense, empty_plan(dense, EMPTY["nothing"]))
    assert_same(export(model, tmp_path / "model.onnx", exporter="torchscript"), model)


@pytest.mark.parametrize("family", slow_but(("bert", "t5", "llama")))
def test_dense_models_by_torchscript(family: str, tmp_path: Path) -> None:
    model = build(family)
    assert_same(export(model, tmp_path / "model.onnx", exporter="torchscript"), model)


# Tracing takes dynamo seconds a layer, some twenty times as long as torchscript.
@pytest.mark.parametrize("family", slow_but(("bert", "opt")))
def test_every_family_by_dynamo(family: str, tmp_path: Path) -> None:
    model = half(one_layer(family))
    before = state(model)
    path = export(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert state(model) == before
    assert_same(path, model)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_layers_by_dynamo(family: str, tmp_path: Path) -> None:
    dense = build(family)
    model = compact(dense, empty_plan(dense, EMPTY["no heads in the first layer"]))
    assert_same(export(model, tmp_path / "model.onnx"), model)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_models_by_dynamo(family: str, tmp_path: Path) -> None:
    model = one_layer(family)
    assert_same(export(model, tmp_path / "model.onnx"), model)


# -- inputs and outputs ----------------------------------------------------------------------------


def tiny_bert(cls: Any) -> Any:
    return drawn(lambda: cls(build("bert").config))


def test_outputs_are_the_logits_or_all_tensors(tmp_path: Path) -> None:
    for cls, names in (
        (BertForQuestionAnswering, ["start_logits", "end_logits"]),
        (BertModel, ["last_hidden_state", "pooler_output"]),
    ):
        model = half(tiny_bert(cls))
        path = export(model, tmp_path / "model.onnx", exporter="torchscript")
        assert [value.name for value in session_of(path).get_outputs()] == names
        given = batch_of(model, 3, 8)
        with torch.no_grad():
            expected = model(**given)
        for name, found in zip(names, run(session_of(path), given, *names), strict=True):
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


def test_an_encoder_alone(tmp_path: Path) -> None:
    model = half(drawn(lambda: T5EncoderModel(build("t5").config)))
    path = export(model, tmp_path / "model.onnx", exporter="torchscript")
    given = {name: tensor for name, tensor in batch_of(model, 3, 8).items() if not name.startswith("decoder")}
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    torch.testing.assert_close(run(session_of(path), given, "last_hidden_state")[0], expected, rtol=1e-4, atol=1e-4)


def test_an_example_says_what_the_inputs_are(tmp_path: Path) -> None:
    model = half(build("bert"))
    example = {"input_ids": torch.randint(3, VOCAB, (2, 6))}
    path = export(model, tmp_path / "model.onnx", exporter="torchscript", example=example)
    assert [value.name for value in session_of(path).get_inputs()] == ["input_ids"]
    given = {"input_ids": torch.randint(3, VOCAB, (4, 9))}
    with torch.no_grad():
        torch.testing.assert_close(run(session_of(path), given)[0], model(**given).logits, rtol=1e-4, atol=1e-4)


def test_gathered_inputs_and_a_uniform_shape(tmp_path: Path) -> None:
    dense = one_layer("llama")
    dims = [site for site in find_sites(dense) if site.kind == "input_dim"]
    plan = plan_of(dense, {site.name: np.arange(site.n_units) % 3 > 0 for site in dims})
    model = compact(dense, plan, gather="always")
    for uniform in (False, True):
        path = export(model, tmp_path / "model.onnx", exporter="torchscript", uniform=uniform)
        assert_same(path, model)


# -- the model, and what lies on the disk ----------------------------------------------------------


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = half(one_layer("bert")).train()
    model.set_attn_implementation("sdpa")
    before, noise = state(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    export(model, tmp_path / "model.onnx", exporter="torchscript")
    assert state(model) == before and torch.equal(torch.get_rng_state(), noise)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache
    assert model(**inputs(model)).logits.requires_grad


def test_large_models_keep_their_weights_in_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_SINGLE_FILE_BYTES", 0)
    model = half(one_layer("vit"))
    path = export(model, tmp_path / "model.onnx")
    first = {file.name for file in tmp_path.iterdir()}
    assert len(first) == 2 and "model.onnx" in first
    proto = onnx.load(str(path), load_external_data=False)
    named = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    assert named == first - {"model.onnx"}
    assert_same(path, model)
    with pytest.raises(ValueError, match="over 2 GB use exporter='dynamo'"):
        export(model, path, exporter="torchscript")
    monkeypatch.undo()
    export(model, path, exporter="torchscript")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def assert_refused(model: Any, place: Path, error: type[Exception], match: str, **options: Any) -> None:
    """The error says so; what lay there before lies there still, and nothing else."""
    (place / "model.onnx").write_bytes(b"old")
    before = content(place)
    with pytest.raises(error, match=match):
        export(model, place / "model.onnx", **{"exporter": "torchscript"} | options)
    assert content(place) == before


def test_an_unequal_file_is_an_error(tmp_path: Path) -> None:
    model = half(build("bert"))
    assert_refused(model, tmp_path, RuntimeError, "logits differs from torch's", tolerance=1e-12)
    # What tracing takes for a constant: the number of rows.
    forward = model.bert.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.pooler_output = found.pooler_output * len(found.pooler_output)
        return found

    model.bert.forward = counting
    assert_refused(model, tmp_path, RuntimeError, "logits differs from torch's|torch cannot export")


def test_what_torch_cannot_trace_is_an_error(tmp_path: Path) -> None:
    model = build("bert")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("no such thing") if torch.jit.is_tracing() else StopIteration

    forward = model.bert.forward
    model.bert.forward = lambda *args, **kwargs: (
        broken() if torch.jit.is_tracing() else forward(*args, **kwargs)  # type: ignore[union-attr]
    )
    assert_refused(model, tmp_path, RuntimeError, "torch cannot export.*no such thing.*try exporter='dynamo'")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half(build("vit"))
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    assert_refused(model, tmp_path, ImportError, r'needs onnx and onnxscript.*pip install "topoprune\[onnx\]"')
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.warns(UserWarning, match="onnxruntime is not installed: the ONNX file was not compared"):
        path = export(model, tmp_path / "model.onnx", exporter="torchscript")
    assert_same(path, model)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    model = half(build("bert"))
    assert_refused(model, tmp_path, ValueError, "unknown exporter 'tensorrt'", exporter="tensorrt")
    assert_refused(model, tmp_path, ValueError, "tolerance is 0", tolerance=0)
    assert_refused(torch.nn.Linear(2, 2), tmp_path, ValueError, "transformers models, found a Linear")
    assert_refused(copy.deepcopy(model).half(), tmp_path, ValueError, r"torch.float16.*model.float\(\)")
    assert_refused(model, tmp_path, ValueError, "takes no input 'pixels'", example={"pixels": torch.zeros(2, 2)})
    assert_refused(model, tmp_path, ValueError, "at least two rows", example={"input_ids": torch.ones(1, 4).long()})
    assert_refused(model, tmp_path, ValueError, "example is empty", example={})
    with torch.device("meta"):
        assert_refused(BertModel(BertConfig(hidden_size=8, num_attention_heads=2)), tmp_path, ValueError, "off memory")
    with pytest.raises(FileNotFoundError, match="create it first"):
        export(model, tmp_path / "nowhere" / "model.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export(model, tmp_path / "folder.onnx")
