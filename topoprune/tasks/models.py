"""Models and tokenizers by local folder, hub id, or ``"embedded"``, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from topoprune.tasks.embedded_model import embedded_model_path
from topoprune.tasks.monitor import quiet_libraries

__all__ = ["EMBEDDED", "calibration_batches", "load_backbone", "load_classifier", "load_tokenizer", "resolve_model"]

EMBEDDED = "embedded"


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


def _load(loader: Callable[..., Any], name: str | Path, **options: Any) -> Any:
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
    """Return a model for sequence classification with a head for these classes.

    Raises:
        ValueError: unknown id, hub out of reach, damaged files, or a head with another number of classes.
    """
    from transformers import AutoModelForSequenceClassification

    id2label = dict(enumerate(labels))
    return _load(
        AutoModelForSequenceClassification.from_pretrained,
        name,
        num_labels=len(labels),
        id2label=id2label,
        label2id={label: index for index, label in id2label.items()},
    )


def load_backbone(name: str | Path) -> Any:
    """Return the bare model without a task head, in eval mode; ValueError as `load_classifier`."""
    from transformers import AutoModel

    return _load(AutoModel.from_pretrained, name).eval()


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer, with the end-of-text token as padding where it has none."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def calibration_batches(
    name: str | Path, model: Any, texts: Iterable[str], *, batch_size: int = 16, max_length: int = 64
) -> Iterator[dict[str, Any]]:
    """Yield batches of model inputs on the model's device; nothing is loaded before the first is asked for."""
    tokenizer = load_tokenizer(name)
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
