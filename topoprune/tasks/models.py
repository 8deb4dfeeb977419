"""Models and tokenizers by local folder, hub id, or ``"embedded"``, with errors a person can act on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from topoprune.tasks.embedded_model import embedded_model_path
from topoprune.tasks.monitor import quiet_libraries
from topoprune.tasks.task import NewModel

__all__ = [
    "EMBEDDED",
    "calibration_batches",
    "classification_head",
    "has_tokenizer",
    "load_backbone",
    "load_classifier",
    "load_full",
    "load_headed",
    "load_pretrained",
    "load_tokenizer",
    "main_input",
    "model_class",
    "new_classifier",
    "new_network",
    "resolve_model",
]

EMBEDDED = "embedded"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "source.spm",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def resolve_model(name: str | Path) -> str:
    """Return a folder or hub id; ``"embedded"`` becomes the folder of the embedded MiniLM.

    Raises:
        FileNotFoundError: something that looks like a path but is no folder, or has no config.
    """
    text = str(name)
    if text == EMBEDDED:
        return str(embedded_model_path())
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"folder {path} holds no model: it has no config.json")
        return str(path)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise FileNotFoundError(
            f"no model folder {text}; expected a folder with config.json, a hub id, or '{EMBEDDED}'"
        )
    return text


def load_pretrained(loader: Callable[..., Any], name: str | Path, **options: Any) -> Any:
    """Call a loader (``AutoModel.from_pretrained``) on a folder or hub id.

    Raises:
        FileNotFoundError: as `resolve_model`.
        ValueError: unknown id, hub out of reach, or damaged files; says what to do.
    """
    where = resolve_model(name)
    try:
        with quiet_libraries():
            return loader(where, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
        hint = (
            "the folder is incomplete or of another kind of model"
            if Path(where).is_dir()
            else "no local folder of that name, and the hub has no such model or is out of reach; "
            f"give a local folder or '{EMBEDDED}'"
        )
        raise ValueError(f"cannot load {str(name)!r}: {hint} ({first})") from error


def load_classifier(name: str | Path, labels: Sequence[str]) -> Any:
    """Return a model for sequence classification with a head for these classes, or for one number (no labels).

    Compacted folders are read too. Where a saved head has another number of classes, a new one takes its place, and
    a warning says so.

    Raises:
        ValueError: unknown id, hub out of reach, or damaged files.
    """
    from transformers import AutoModelForSequenceClassification

    return load_headed(AutoModelForSequenceClassification, name, classification_head(labels))


def load_headed(auto_class: Any, name: str | Path, head: Mapping[str, Any]) -> Any:
    """Return a model under a classification head; see `load_classifier`.

    Args:
        auto_class: such as ``AutoModelForImageClassification``. name: folder, hub id, or ``"embedded"``.
        head: from `classification_head`.
    """
    from transformers import AutoConfig

    from topoprune.tasks.transfer import is_compacted, load_under

    config = load_pretrained(AutoConfig.from_pretrained, name)
    saved = next((cls for cls in config.architectures or () if cls.endswith("Classification")), None)
    other = saved is not None and config.num_labels != head["num_labels"]
    if not other and not is_compacted(name):
        return load_pretrained(auto_class.from_pretrained, name, **head)
    network, new = load_under(name, auto_class, **head)
    if other:
        warnings.warn(
            f"{name} was trained for {config.num_labels} classes, this task has {head['num_labels']}: its head is "
            f"made anew ({', '.join(new)})",
            stacklevel=2,
        )
    return network


def new_classifier(new: NewModel, tokenizer: Any, labels: Sequence[str]) -> Any:
    """Return a model for sequence classification with random weights, for a tokenizer's vocabulary."""
    from transformers import AutoModelForSequenceClassification

    from topoprune.tasks.scratch import build_model

    new = replace(new, overrides={**new.overrides, **classification_head(labels)})
    return build_model(new, AutoModelForSequenceClassification, tokenizer)


def new_network(new: NewModel, auto_class: Any, fields: Mapping[str, Any]) -> Any:
    """Return a model of random weights that reads no text.

    Args:
        new: type and configuration. auto_class: such as ``AutoModelForImageClassification``.
        fields: of its configuration, beside those of `new`.

    Raises:
        ValueError: an unknown type, one that the class does not make, or sizes that do not fit.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(new.model_type, **new.overrides, **fields)
        return auto_class.from_config(config)
    except Exception as error:  # transformers checks sizes in many ways, by assertions too
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
        raise ValueError(f"cannot build a {new}: {first}") from error


def classification_head(labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a config that describe a classification head."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    id2label = dict(enumerate(labels))
    return {
        "num_labels": len(labels),
        "id2label": id2label,
        "label2id": {label: index for index, label in id2label.items()},
        "problem_type": "single_label_classification",
    }


def load_backbone(name: str | Path) -> Any:
    """Return the bare model without a task head, in eval mode; ValueError as `load_classifier`."""
    from transformers import AutoModel

    return load_pretrained(AutoModel.from_pretrained, name).eval()


def model_class(name: str | Path) -> tuple[type[Any] | None, Any]:
    """Return the transformers class that a model was saved as, and its config; no weights are read.

    The class is that of ``config.architectures``; the bare model's where the config names none, and None for
    a folder that `topoprune.save` wrote.

    Raises:
        ValueError: unknown id, hub out of reach, damaged files, or a class that this transformers has not.
    """
    import transformers

    config = load_pretrained(transformers.AutoConfig.from_pretrained, name)
    if getattr(config, "topoprune", None) is not None:
        return None, config
    names = getattr(config, "architectures", None) or ()
    if not names:
        return _base_class(config), config
    found = getattr(transformers, names[0], None)
    if not isinstance(found, type):
        raise ValueError(
            f"{str(name)!r} was saved as a {names[0]}, which transformers {transformers.__version__} does not have; "
            "load it in Python and use topoprune there"
        )
    return found, config


def main_input(name: str | Path) -> str:
    """Return the main argument of a model's forward, ``"input_ids"`` or ``"pixel_values"``; no weights are read."""
    _, config = model_class(name)
    return str(_base_class(config).main_input_name)


def _base_class(config: Any) -> Any:
    """Return transformers' class for the bare model of a config."""
    from transformers import MODEL_MAPPING

    known: Any = MODEL_MAPPING
    if type(config) not in known:
        raise ValueError(f"transformers has no model without a task head for {type(config).__name__}")
    found = known[type(config)]
    return found[0] if isinstance(found, tuple) else found


def has_tokenizer(where: str) -> bool:
    """Return whether a folder holds files of a tokenizer; True for a hub id, which only the hub can tell.

    transformers makes an empty tokenizer up where a folder has none.
    """
    folder = Path(where)
    return not folder.is_dir() or any((folder / file).is_file() for file in _TOKENIZER_FILES)


def load_full(name: str | Path, *, dtype: str = "auto") -> Any:
    """Return a model as it was saved, with its own task head, in eval mode; compacted ones too.

    Args:
        name: folder, hub id, or ``"embedded"``. dtype: ``"auto"`` (as saved), ``"float32"``, ``"bfloat16"``,
            ``"float16"``.

    Raises:
        ValueError: as `model_class`, weights that do not fit, or files without some of them.
    """
    cls, _ = model_class(name)
    if cls is None:
        from topoprune.compaction.loading import load

        return load_pretrained(load, name, dtype=dtype).eval()
    model, info = load_pretrained(cls.from_pretrained, name, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"the files of {str(name)!r} lack {len(missing)} weights of a {cls.__name__}, {missing[0]!r} first: "
            "they would be random numbers. Load it in Python and use topoprune there"
        )
    return model.eval()


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer, with the end-of-text token as padding where it has none."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def calibration_batches(
    name: str | Path, model: Any, texts: Iterable[str], *, batch_size: int = 16, max_length: int = 64
) -> Iterator[dict[str, Any]]:
    """Yield batches of model inputs on the model's device; nothing is loaded before the first is asked for."""
    tokenizer = load_tokenizer(name)
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        max_length = max(1, min(max_length, positions - 2))  # RoBERTa counts positions from 2
    chosen = list(texts)
    for start in range(0, len(chosen), batch_size):
        batch = tokenizer(
            chosen[start : start + batch_size],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
        yield inputs
