"""Sites of every family: names, slices, and that a unit is what the old head mask said it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    GPT2Config,
    GPT2Model,
    MBartConfig,
    MBartModel,
    MistralConfig,
    MistralModel,
    MT5Config,
    MT5Model,
    OPTForCausalLM,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from tests.tiny import FAMILIES, HEADS, HIDDEN, LAYERS, NEURONS, SEQ2SEQ, build, inputs
from topoprune.architectures import (
    FAMILIES as ADAPTERS,
)
from topoprune.architectures import (
    Attention,
    FeedForward,
    check_sites,
    counted_matrices,
    find_sites,
    matrix_parameters,
    model_config,
)
from topoprune.extraction import named_tensors, unit_blocks, unit_rows
from topoprune.graph import Site, TensorSlice, structure_digest

every_family = pytest.mark.parametrize("family", FAMILIES)
TWO_STACKS = ("t5", "t5-gated", "bart", "marian")
GROUPED = ("llama", "qwen2", "qwen3")
HEAD_WIDTH = {"t5": 8, "t5-gated": 8, "qwen3": 8}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def expected_names(family: str) -> list[str]:
    names = []
    for stack in ("encoder", "decoder") if family in TWO_STACKS else (model_stack(family),):
        for layer in range(LAYERS):
            names += [f"{stack}.{layer}.attention", f"{stack}.{layer}.attention.input"]
            if stack == "decoder" and family in TWO_STACKS:
                cross = f"{stack}.{layer}.cross_attention"
                names += [cross, f"{cross}.input", f"{cross}.memory"]
            names.append(f"{stack}.{layer}.ffn")
    return names


def model_stack(family: str) -> str:
    return "encoder" if family in ("bert", "roberta", "distilbert", "vit") else "decoder"


@every_family
def test_all_sites_are_found_in_model_order(family: str) -> None:
    sites = find_sites(FAMILIES[family]())
    assert [site.name for site in sites] == expected_names(family)
    for site in sites:
        if site.kind == "neuron":
            assert (site.n_units, site.unit_width, site.block) == (NEURONS, 1, "ffn")
        elif site.kind == "input_dim":
            assert (site.n_units, site.writes, site.consumer) == (HIDDEN, (), None)
        else:
            group = HEADS // site.n_units
            assert site.kind == ("kv_group" if family in GROUPED else "head")
            assert group == (2 if family in GROUPED else 1)
            assert site.head_width == HEAD_WIDTH.get(family, HIDDEN // HEADS)
            assert site.unit_width == group * site.head_width
            assert site.rotary == (family in GROUPED)


@every_family
def test_units_partition_every_tensor_they_touch(family: str) -> None:
    """All units of a site together own each of its tensors exactly once."""
    model = FAMILIES[family]()
    tensors = named_tensors(model)
    for site in find_sites(model):
        owned: dict[str, torch.Tensor] = {}
        for piece in site.slices:
            count = owned.setdefault(piece.param, torch.zeros(piece.shape))
            count.index_add_(
                piece.axis,
                torch.from_numpy(piece.indices(np.arange(site.n_units))),
                torch.ones([site.n_units * piece.width if a == piece.axis else s for a, s in enumerate(piece.shape)]),
            )
        for name, count in owned.items():
            assert tuple(count.shape) == tuple(tensors[name].shape)
            assert torch.all(count == 1), f"{site.name}: {name}"
        assert site.parameters_per_unit * site.n_units == sum(tensors[name].numel() for name in owned)
        matrices = [name for name in owned if tensors[name].ndim == 2]
        assert site.matrix_parameters_per_unit * site.n_units == sum(tensors[name].numel() for name in matrices)


@every_family
def test_biases_of_the_producing_projections_belong_to_the_unit(family: str) -> None:
    model = FAMILIES[family]()
    tensors = named_tensors(model)
    for site in find_sites(model, ("heads", "neurons")):
        biases = {piece.param for piece in site.slices if piece.role.endswith("_bias")}
        weights = {piece.param for piece in site.reads if not piece.role.endswith("_bias")}
        assert biases == {w.replace(".weight", ".bias") for w in weights} & set(tensors)
        assert not any(piece.role.endswith("_bias") for piece in site.writes)


@every_family
def test_zeroed_unit_equals_head_mask(family: str) -> None:
    """Zeroing a unit's slices gives the logits of zeroing its part of the consumer's input."""
    model = FAMILIES[family]()
    batch = inputs(model)
    dense = logits(model, batch)
    for site in find_sites(model, ("heads", "neurons")):
        unit = site.n_units - 2
        own = slice(unit * site.unit_width, (unit + 1) * site.unit_width)

        def mask(module: nn.Module, args: tuple, own: slice = own) -> tuple:
            x = args[0].clone()
            x[..., own] = 0
            return (x, *args[1:])

        with model.get_submodule(site.consumer).register_forward_pre_hook(mask):
            masked = logits(model, batch)
        pruned = copy.deepcopy(model)
        parameters = dict(pruned.named_parameters())
        with torch.no_grad():
            for piece in site.slices:
                index = torch.from_numpy(piece.indices(np.array([unit])))
                parameters[piece.param].index_fill_(piece.axis, index, 0.0)
        torch.testing.assert_close(logits(pruned, batch), masked, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(masked, dense, atol=1e-5), f"unit {unit} of {site.name} does nothing"


@every_family
def test_zeroed_input_dimension_is_not_read(family: str) -> None:
    """With its slices zeroed, an input dimension no longer reaches q, k and v."""
    model = FAMILIES[family]()
    site = next(site for site in find_sites(model, ("input_dims",)))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for piece in site.reads:
            parameters[piece.param].index_fill_(piece.axis, torch.tensor([5]), 0.0)
    module = model.get_submodule(site.reads[0].param.removesuffix(".weight"))
    x = torch.randn(1, 3, HIDDEN)
    moved = x.clone()
    moved[..., 5] += 7
    torch.testing.assert_close(module(x), module(moved))


@every_family
def test_compiled_and_wrapped_models_have_the_same_structure(family: str) -> None:
    model = FAMILIES[family]()
    expected = structure_digest(find_sites(model))
    assert structure_digest(find_sites(torch.compile(model))) == expected
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel
    assert model_config(wrapped) is model.config
    assert structure_digest(find_sites(wrapped)) == expected


@every_family
def test_declared_attributes_say_the_number_of_heads(family: str) -> None:
    """What compaction sets is what the dense module already says, under this version of transformers."""
    model = FAMILIES[family]()
    blocks = {
        (block.stack, block.block): block
        for block in ADAPTERS[model.config.model_type].blocks
        if isinstance(block, Attention)
    }
    for site in find_sites(model, ("heads",)):
        owner = model.get_submodule(site.one("q").param.rsplit(".", 2)[0])
        per_unit = site.unit_width // site.head_width
        meanings = {"heads": HEADS, "width": HEADS * site.head_width, "groups": per_unit}
        declared = blocks[site.stack, site.block].attributes
        assert {name: getattr(owner, name) for name, _ in declared} == {name: meanings[m] for name, m in declared}


def test_bare_model_and_task_head_have_the_same_sites() -> None:
    model = build("bert")
    with_head, bare = find_sites(model), find_sites(model.base_model)
    assert [site.name for site in with_head] == [site.name for site in bare]
    assert structure_digest(with_head) == structure_digest(bare)
    assert with_head[0].consumer == "bert.encoder.layer.0.attention.output.dense"
    assert bare[0].consumer == "encoder.layer.0.attention.output.dense"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (XLMRobertaConfig, XLMRobertaModel),
        (CamembertConfig, CamembertModel),
        (MistralConfig, MistralModel),
        (MT5Config, MT5Model),
        (MBartConfig, MBartModel),
    ],
)
def test_siblings_share_a_declaration(config: type, kind: type) -> None:
    shape = dict(vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    if config is MT5Config:
        shape = dict(vocab_size=32, d_model=HIDDEN, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    elif config is MBartConfig:
        shape = SEQ2SEQ
    elif config is MistralConfig:
        shape["num_key_value_heads"] = 2
    assert find_sites(kind(config(**shape)))[0].n_units == (2 if config is MistralConfig else 4)


def test_encoder_only_t5_has_no_decoder() -> None:
    model = T5EncoderModel(build("t5").config)
    assert {site.stack for site in find_sites(model)} == {"encoder"}


def test_decoder_of_opt_alone() -> None:
    opt = build("opt")
    assert isinstance(opt, OPTForCausalLM)
    assert structure_digest(find_sites(opt.model.decoder)) == structure_digest(find_sites(opt))


@pytest.mark.parametrize("include", [("heads",), ("neurons",), ("input_dims",), ("neurons", "heads")])
def test_include_filters(include: tuple[str, ...]) -> None:
    kinds = {"heads": "head", "neurons": "neuron", "input_dims": "input_dim"}
    assert {site.kind for site in find_sites(build("bert"), include)} == {kinds[label] for label in include}


@pytest.mark.parametrize("include", ["heads", ("heads", "tails")])
def test_unknown_include(include: object) -> None:
    with pytest.raises(ValueError, match=r"choose from heads, neurons, input_dims"):
        find_sites(build("bert"), include)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", TWO_STACKS)
def test_cross_attention_reads_two_streams(family: str) -> None:
    sites = {site.name: site for site in find_sites(build(family))}
    assert [piece.role for piece in sites["decoder.1.cross_attention.input"].reads] == ["q"]
    assert [piece.role for piece in sites["decoder.1.cross_attention.memory"].reads] == ["k", "v"]
    assert sites["decoder.1.cross_attention"].block == "cross_attention"


def test_grouped_query_widths() -> None:
    site = find_sites(build("qwen3"), ("heads",))[0]
    assert (site.kind, site.n_units) == ("kv_group", 2)
    assert {piece.role: piece.width for piece in site.slices} == {"q": 16, "k": 8, "v": 8, "o": 16}
    assert {piece.role for piece in find_sites(build("qwen2"))[0].slices} >= {"q_bias", "k_bias", "v_bias"}


def test_equal_kv_heads_are_plain_heads() -> None:
    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=8,
    )
    assert find_sites(MistralModel(config))[0].kind == "head"


def test_fused_projection_of_gpt2() -> None:
    model = build("gpt2")
    tensors = named_tensors(model)
    sites = {site.name: site for site in find_sites(model)}
    site = sites["decoder.0.attention"]
    assert [site.one(role).offset for role in "qkv"] == [0, HIDDEN, 2 * HIDDEN]
    fused = tensors[site.one("k").param]
    width = HIDDEN // HEADS
    got = unit_blocks(tensors, site, site.one("k"))[2]
    torch.testing.assert_close(got, fused[:, HIDDEN + 2 * width : HIDDEN + 3 * width].T)
    row = sites["decoder.0.attention.input"]
    assert [piece.role for piece in row.reads] == ["qkv"]
    assert row.parameters_per_unit == 3 * HIDDEN


def test_unit_rows_of_chosen_units() -> None:
    model = build("bert")
    tensors = named_tensors(model)
    for site in find_sites(model):
        for piece in site.slices:
            every = unit_rows(tensors, site, piece)
            assert every.shape[0] == site.n_units
            torch.testing.assert_close(unit_rows(tensors, site, piece, np.array([3, 1])), every[[3, 1]])


def test_gpt2_without_inner_width_has_four_times_hidden() -> None:
    model = GPT2Model(
        GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    )
    assert find_sites(model, ("neurons",))[0].n_units == 32


@every_family
def test_counted_matrices_are_attention_and_ffn(family: str) -> None:
    model = FAMILIES[family]()
    matrices = counted_matrices(find_sites(model))
    parameters = dict(model.named_parameters())
    assert all(tuple(parameters[name].shape) == shape for name, shape in matrices.items())
    assert not any("embed" in name or "norm" in name.lower() or "classifier" in name for name in matrices)
    assert matrix_parameters(find_sites(model)) == sum(parameters[name].numel() for name in matrices)
    assert counted_matrices(find_sites(model, ("heads", "neurons"))) == matrices


# Errors


def test_unknown_model_type_lists_the_known_ones() -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="foo")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"no adapter for model_type='foo'; known: bart, .*sites=\[Site") as error:
        find_sites(model)
    assert all(name in str(error.value) for name in ADAPTERS)


def test_module_without_config() -> None:
    with pytest.raises(ValueError, match="no adapter for model_type=None"):
        find_sites(nn.Linear(2, 2))


def test_already_pruned_model_is_refused() -> None:
    model = build("bert")
    layer = model.bert.encoder.layer[1]
    layer.intermediate.dense = nn.Linear(HIDDEN, 17)
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.1\.intermediate\.dense.*\(17, 24\).*\(40, 24\).*already pruned"
    ):
        find_sites(model)


def test_missing_layer_is_refused() -> None:
    model = build("bert")
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    with pytest.raises(ValueError, match=r"ends in 'encoder\.layer\.1\.attention\.self\.query', found 0"):
        find_sites(model)


def test_two_models_in_one_are_ambiguous() -> None:
    pair = nn.ModuleDict({"left": build("bert"), "right": build("bert")})
    pair.config = pair["left"].config  # type: ignore[assignment]
    with pytest.raises(ValueError, match="found 2"):
        find_sites(pair)


def test_none_of_the_modules_fit() -> None:
    model = nn.Linear(2, 2)
    model.config = BertConfig()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"none of its modules end in 'encoder\.layer\.0\.attention"):
        find_sites(model)


def test_undeclared_cross_attention_is_refused() -> None:
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="add_cross_attention"):
        find_sites(BertModel(config))


def test_quantised_weights_are_refused() -> None:
    model = build("bert")
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(torch.zeros(dense.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight is torch\.int8.*without quantisation"):
        find_sites(model)


def test_tied_matrices_are_refused() -> None:
    model = build("bert")
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    with pytest.raises(ValueError, match="one tied tensor"):
        find_sites(model)


def test_declaration_of_a_feed_forward_block_is_checked() -> None:
    with pytest.raises(ValueError, match="either"):
        FeedForward(out="o", gate="g")
    with pytest.raises(ValueError, match="either"):
        FeedForward(out="o", into="i", gate="g", up="u")
    assert Attention(q="a", k="a", v="a", o="o").fused


SITE = Site(
    "ffn",
    "neuron",
    4,
    1,
    (TensorSlice("0.weight", 0, "in", (4, 3)),),
    (TensorSlice("2.weight", 1, "out", (3, 4)),),
    "2",
)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (replace(SITE, reads=(TensorSlice("0.wait", 0, "in", (4, 3)),)), r"'0\.wait'.*did you mean '0\.weight'"),
        (replace(SITE, reads=(TensorSlice("0.weight", 0, "in", (5, 3)),)), r"shape \(4, 3\), expected \(5, 3\)"),
        (replace(SITE, n_units=5), r"5 units of width 1.*do not fit axis 0 of '0\.weight'"),
        (replace(SITE, reads=(TensorSlice("0.weight", 2, "in", (4, 3)),)), "do not fit axis 2"),
        (replace(SITE, consumer="3"), "consumer '3'"),
    ],
)
def test_sites_given_by_hand_are_checked(site: Site, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    check_sites(model, [SITE])
    with pytest.raises(ValueError, match=message):
        check_sites(model, [site])
    with pytest.raises(ValueError, match="'ffn' occurs twice"):
        check_sites(model, [SITE, SITE])
