"""Masked and compacted models generate the same: greedy and beams, dynamic and static caches, any padding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.compaction.cases import EMPTY, GENERATING, empty_plan, structure_plan, trained
from tests.tiny import build, inputs
from topoprune import apply, check_equivalence, compact
from topoprune.compaction.generating import prompt_of

every_family = pytest.mark.parametrize("family", GENERATING)
CACHES = ("dynamic", "static")
EMPTIED = ("no heads in the first layer", "no heads in the last layer", "no cross attention", "nothing")


def outputs_of_generation(family: str, dtype: torch.dtype) -> set[str]:
    rows = {"generated_logits[dynamic]", "generated_logits[static]"}
    return rows if dtype != torch.float32 else rows | {"tokens[dynamic]", "tokens[static]"}


@every_family
@pytest.mark.parametrize(
    ("attention", "dtype"), [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
)
def test_random_plans(family: str, attention: str, dtype: torch.dtype) -> None:
    model: Any = build(family).to(dtype)
    model.set_attn_implementation(attention)
    plan = structure_plan(model)
    with apply(model, plan):
        found = check_equivalence(model, compact(model, plan), inputs(model), generate=True, max_new_tokens=4)
    found.require()
    assert outputs_of_generation(family, dtype) <= {row.output for row in found.outputs}


@every_family
def test_plans_that_empty_layers(family: str) -> None:
    model: Any = build(family)
    for case in EMPTIED:
        if case == "no cross attention" and not model.config.is_encoder_decoder:
            continue
        plan = empty_plan(model, EMPTY[case])
        with apply(model, plan):
            found = check_equivalence(model, compact(model, plan), inputs(model), generate=True, max_new_tokens=3)
        assert found, f"{case}\n{found}"


@every_family
def test_trained_plans(family: str) -> None:
    model, plan = trained(family)
    check_equivalence(model, compact(model, plan), inputs(model), generate=True, max_new_tokens=4).require()


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "llama", "gpt2"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", ["half", "no heads in the first layer", "no cross attention"])
def test_beams(family: str, cache: str, case: str) -> None:
    model: Any = build(family)
    plan = structure_plan(model) if case == "half" else empty_plan(model, EMPTY[case])
    settings = dict(
        num_beams=2, max_new_tokens=5, do_sample=False, cache_implementation=cache, disable_compile=True, pad_token_id=0
    )
    prompt = prompt_of(model, inputs(model))
    with apply(model, plan):
        smaller: Any = compact(model, plan)
        assert torch.equal(smaller.generate(**prompt, **settings), model.generate(**prompt, **settings))


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_padding_moves_to_the_left_for_decoders_alone(family: str) -> None:
    model: Any = build(family)
    right = inputs(model, batch=4)
    left = prompt_of(model, right)
    assert set(left) == {"input_ids", "attention_mask"}
    assert torch.equal(left["attention_mask"], right["attention_mask"].flip(1))
    for row in range(4):
        assert torch.equal(
            left["input_ids"][row][left["attention_mask"][row] == 1],
            right["input_ids"][row][right["attention_mask"][row] == 1],
        )
    # Left as it is: the law behind moving it, that a padded row goes on as it would alone.
    alone = left["input_ids"][2][left["attention_mask"][2] == 1][None]
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**left, **settings)[2, -4:], model.generate(input_ids=alone, **settings)[0, -4:])
    assert all(torch.equal(value, left[key]) for key, value in prompt_of(model, left).items())


def test_encoders_keep_their_padding_and_decoders_their_start() -> None:
    model = build("bart")
    batch = inputs(model)
    extra = {"decoder_input_ids": batch["labels"].clamp(min=0), "use_cache": True}
    prompt = prompt_of(model, batch | extra)
    assert set(prompt) == {"input_ids", "attention_mask"}
    assert all(torch.equal(value, batch[key]) for key, value in prompt.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_model_is_found_out(dtype: torch.dtype) -> None:
    found = check_equivalence(
        build("llama").to(dtype), build("llama", seed=1).to(dtype), inputs(build("llama")), generate=True
    )
    unequal = {row.output: row for row in found.outputs if not row.equal}
    if dtype == torch.float32:
        assert set(unequal) == {"logits", "tokens[dynamic]", "tokens[static]"}
        assert "parts at new token" in unequal["tokens[static]"].note and "instead of" in unequal["tokens[static]"].note
        assert unequal["tokens[dynamic]"].max_abs >= 1
    else:
        assert set(unequal) == {"logits", "generated_logits[dynamic]", "generated_logits[static]"}


def test_a_mistake_that_needs_a_cache_to_show_is_found_out() -> None:
    model = build("gpt2")
    plan = structure_plan(model)
    smaller: Any = compact(model, plan)

    def spoil(module: Any, args: Any, output: Any) -> Any:
        return output if output[0].shape[1] > 1 else (-output[0], *output[1:])

    smaller.transformer.h[1].attn.register_forward_hook(spoil)
    with apply(model, plan):
        found = check_equivalence(model, smaller, inputs(model), generate=True)
    assert [row.output for row in found.outputs if row.equal] == ["logits"]


def test_the_models_own_settings_are_used_and_kept() -> None:
    model: Any = build("gpt2")
    model.generation_config.update(do_sample=True, temperature=0.3, num_beams=3, forced_bos_token_id=None)
    before = model.generation_config.to_dict()
    smaller = compact(model)
    assert check_equivalence(model, smaller, inputs(model), generate=True, max_new_tokens=3)
    assert model.generation_config.to_dict() == before
    assert not hasattr(model, "_previous_max_cache_length") and not hasattr(smaller, "_previous_max_cache_length")


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_generating_left_on_the_dense_model_does_not_go_along(family: str, inplace: bool) -> None:
    model: Any = build(family)
    plan = structure_plan(model)
    twin = build(family)
    settings = dict(max_new_tokens=3, cache_implementation="static", disable_compile=True, pad_token_id=0)
    model.generate(**prompt_of(model, inputs(model)), **settings)
    model._compiled_call = model.__call__  # as generate leaves it on a GPU
    smaller: Any = compact(model, plan, inplace=inplace)
    assert not {"_compiled_call", "_cache"} & set(vars(smaller))
    with apply(twin, plan):
        assert check_equivalence(twin, smaller, inputs(twin), generate=True, max_new_tokens=3)


# -- refusals --------------------------------------------------------------------------------------


def test_classes_that_cannot_generate_are_named() -> None:
    bert = build("bert")
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot generate"):
        check_equivalence(bert, compact(bert), inputs(bert), generate=True)
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear cannot generate"):
        check_equivalence(linear, linear, {"input": torch.ones(2)}, generate=True)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True])
def test_a_bad_number_of_tokens_is_refused(tokens: Any) -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match="max_new_tokens is"):
        check_equivalence(model, model, inputs(model), generate=True, max_new_tokens=tokens)


@pytest.mark.parametrize("caches", [(), ("dynamc",), "static"])
def test_unknown_caches_are_refused(caches: Any) -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match=r"expected some of dynamic, static"):
        check_equivalence(model, model, inputs(model), generate=True, caches=caches)


# -- real weights ----------------------------------------------------------------------------------


@pytest.mark.pretrained
@pytest.mark.skipif(not os.environ.get("TOPOPRUNE_DATA"), reason="TOPOPRUNE_DATA is not set: no real models here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pretrained_model_tells_the_same_story(dtype: torch.dtype) -> None:
    folder = Path(os.environ["TOPOPRUNE_DATA"], "models", "stories260k-llama")
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    for plan in (structure_plan(model, 0.25), empty_plan(model, EMPTY["no heads in the first layer"])):
        with apply(model, plan):
            found = check_equivalence(model, compact(model, plan), {"input_ids": ids}, generate=True, max_new_tokens=24)
        assert found, str(found)
