"""Models and tokenizers from scratch: a configuration and training texts in, random weights and a vocabulary out.

The paper's translation set-up is the model type ``paper-translation``: train it dense, then prune the result, e.g.

    topoprune train --task translation --model-type paper-translation --train-file train.jsonl \\
        --validation-file dev.jsonl --source-lang de --target-lang en --method dense --epochs 15 --learning-rate 5e-4 \\
        --output-dir runs/dense
    topoprune train --task translation --model runs/dense --train-file train.jsonl --validation-file dev.jsonl \\
        --source-lang de --target-lang en --method budget --sparsity 0.5 --epochs 15 --output-dir runs/pruned
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from topoprune.tasks.task import ModelSource, NewModel

__all__ = [
    "PRESETS",
    "build_model",
    "language_model",
    "new_model",
    "new_tokenizer",
    "parse_overrides",
    "tokenizer_for",
]

# Model types of our own: a type of transformers and what differs from its defaults.
# The paper's words are "18-layer encoder-decoder, 6 heads"; we read 18 attention layers: 6 in the encoder, 6 and 6
# (self and cross) in the decoder, as in fairseq's transformer for IWSLT, whose FFN,
# dropout and ReLU these are; heads of 64.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper-translation": (
        "marian",
        {
            "d_model": 384,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 1024,
            "decoder_ffn_dim": 1024,
            "activation_function": "relu",
            "dropout": 0.3,
            "scale_embedding": True,
        },
    ),
}
# In this order they get the ids 0, 1, 2, 3.
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
# What decoding begins with; other types begin with the beginning-of-text token or need nothing.
_STARTS_WITH = {"t5": "pad", "mt5": "pad", "marian": "pad", "bart": "eos"}
_FROM_TOKENIZER = ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")


def new_model(
    model_type: str, overrides: str | Mapping[str, Any] = "", tokenizer: str | None = None, vocab_size: int = 8000
) -> NewModel:
    """Return the description of a model to build, after checking it.

    Args:
        model_type: as transformers names it, or one of `PRESETS`.
        overrides: fields of its configuration, as a mapping or like ``"num_layers=3,d_model=384"``.
        tokenizer: folder or hub id; None trains one.
        vocab_size: of a tokenizer that is trained.

    Raises:
        ValueError: an unknown type, a field that the type's configuration has not (lists those it has), or a value
            of another type than the default.

    Example:
        >>> str(new_model("t5", "num_layers=3,d_model=96"))
        'new t5 (num_layers=3,d_model=96)'
    """
    fields = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
    if model_type in PRESETS:
        model_type, preset = PRESETS[model_type]
        fields = preset | fields
    if vocab_size < 16:
        raise ValueError(f"vocab_size is {vocab_size!r}; expected at least 16")
    _check_fields(model_type, fields)
    return NewModel(model_type, fields, tokenizer, vocab_size)


def parse_overrides(text: str) -> dict[str, Any]:
    """Return configuration fields given as ``name=value,name=value``.

    Values read as Python where they can be (numbers, ``True``, ``None``), else as words.

    Raises:
        ValueError: a part without ``=``, or a name given twice.

    Example:
        >>> parse_overrides("num_layers=3, dropout_rate=0.1, feed_forward_proj=gated-gelu, use_cache=false")
        {'num_layers': 3, 'dropout_rate': 0.1, 'feed_forward_proj': 'gated-gelu', 'use_cache': False}
    """
    fields: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"cannot read {part!r} of the overrides {text!r}; expected name=value,name=value")
        if name in fields:
            raise ValueError(f"{name} is given twice in the overrides {text!r}")
        word = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(value.lower(), value)
        try:
            fields[name] = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            fields[name] = value
    return fields


def new_tokenizer(texts: Iterable[str], vocab_size: int = 8000, *, kind: Literal["bpe", "byte-bpe"] = "bpe") -> Any:
    """Train a tokenizer on texts.

    Args:
        texts: what it is made for.
        vocab_size: tokens at most; small texts give fewer.
        kind: ``"bpe"`` (pieces of words after NFKC, an end token after every text: for encoder-decoders) or
            ``"byte-bpe"`` (pieces of bytes: any text comes back exactly; for language models).

    Returns:
        A tokenizer of transformers with the tokens for padding (0), end (1), unknown (2) and beginning (3).

    Raises:
        ValueError: no text to train on.

    References: Sennrich et al. 2016 (arXiv 1508.07909).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # Sorted and without repetitions: the same vocabulary whatever the order.
    corpus = sorted({text for text in texts if text.strip()})
    if not corpus:
        raise ValueError("no text to train a tokenizer on")
    special = list(_SPECIAL.values())
    end = _SPECIAL["eos_token"]
    # BPE, not unigram: training that in `tokenizers` gives other scores on every run, and a resumed run needs the same.
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, special.index(end))]
        )
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def tokenizer_for(model: ModelSource, texts: Iterable[str], *, kind: Literal["bpe", "byte-bpe"]) -> Any:
    """Return the tokenizer of a model; for a new one that names none, one trained on the texts."""
    from topoprune.tasks.models import load_tokenizer

    if not isinstance(model, NewModel):
        return load_tokenizer(model)
    if model.tokenizer is not None:
        return load_tokenizer(model.tokenizer)
    return new_tokenizer(texts, model.vocab_size, kind=kind)


def language_model(model: ModelSource, auto_class: Any, tokenizer: Any) -> Any:
    """Return a model that writes text: loaded (compacted ones too), or built from scratch.

    Args:
        model: folder, hub id, or a new model. auto_class: ``AutoModelForSeq2SeqLM`` or ``AutoModelForCausalLM``.
        tokenizer: what it will read.

    Raises:
        ValueError: no such model, one of another kind, weights that are missing, or fewer embeddings than tokens.
    """
    if isinstance(model, NewModel):
        return build_model(model, auto_class, tokenizer)
    from topoprune.tasks.models import load_pretrained, model_class

    cls, config = model_class(model)
    _check_kind(str(model), config, auto_class)
    if cls is None:
        from topoprune.compaction.loading import load

        network = load_pretrained(load, model)
    else:
        network, info = load_pretrained(auto_class.from_pretrained, model, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"the files of {str(model)!r} lack {len(missing)} weights of a {type(network).__name__}, "
                f"{missing[0]!r} first: they would be random numbers. Give a model that was saved with its "
                "language-modelling head"
            )
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer of {str(model)!r} has {len(tokenizer)} tokens, the model embeddings for {rows}; "
            "give the tokenizer that the model was trained with"
        )
    if network.config.pad_token_id is None:
        network.config.pad_token_id = network.generation_config.pad_token_id = tokenizer.pad_token_id
    return network


def build_model(model: NewModel, auto_class: Any, tokenizer: Any) -> Any:
    """Return a new model with random weights; vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: an unknown type, fields it has not, fields that the tokenizer decides, sizes that do not fit, or
            a model of another kind than `auto_class` makes.
    """
    from transformers import AutoConfig

    _check_fields(model.model_type, model.overrides)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "eos_token", "bos_token")}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["eos_token_id"]
    start = _STARTS_WITH.get(model.model_type)
    if start is not None:
        ids["decoder_start_token_id"] = ids[f"{start}_token_id"]
    fields = dict(model.overrides)
    if hasattr(AutoConfig.for_model(model.model_type), "forced_eos_token_id"):
        fields.setdefault("forced_eos_token_id", None)  # the default names a token of another vocabulary
    try:
        config = AutoConfig.for_model(model.model_type, **fields, **ids, vocab_size=len(tokenizer))
        _check_kind(model.model_type, config, auto_class)
        return auto_class.from_config(config)
    except ImportError:
        raise
    except Exception as error:  # transformers checks sizes in many ways, by assertions too
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
        raise ValueError(f"cannot build a {model}: {first}") from error


def _check_fields(model_type: str, fields: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"unknown model type {model_type!r}; expected one of transformers' (bart, gpt2, llama, marian, opt, t5, "
            f"...) or {', '.join(PRESETS)}"
        )
    defaults = AutoConfig.for_model(model_type)
    for name, value in fields.items():
        if name in _FROM_TOKENIZER:
            raise ValueError(f"{name} comes from the tokenizer; choose that with --tokenizer-name or --vocab-size")
        if not hasattr(defaults, name):
            known = ", ".join(sorted(defaults.to_diff_dict() | defaults.to_dict()))
            raise ValueError(f"a {model_type} configuration has no field {name!r}; it has: {known}")
        default = getattr(defaults, name)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if isinstance(default, (bool, int, float, str)) and (
            not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ValueError(
                f"{name} is {value!r}; a {model_type} configuration holds a {type(default).__name__} there, such as "
                f"{default!r}"
            )


def _check_kind(name: str, config: Any, auto_class: Any) -> None:
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if auto_class.__name__ == "AutoModelForSeq2SeqLM":
        if not encoder_decoder:
            raise ValueError(
                f"{name!r} is a {config.model_type}, which is no encoder-decoder; summarization and translation need "
                "one, such as t5, bart or marian"
            )
        return
    known = type(config) in auto_class._model_mapping
    if encoder_decoder or not known or not _is_decoder(config):
        raise ValueError(
            f"{name!r} is a {config.model_type}, which is no decoder; language modelling needs one, such as gpt2, opt "
            "or llama"
        )


def _is_decoder(config: Any) -> bool:
    """False for encoders: transformers lists some of them under causal models, but they see the whole text."""
    return bool(getattr(config, "is_decoder", False)) or not hasattr(config, "type_vocab_size")
