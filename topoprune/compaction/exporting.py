"""`export`: models for places where topoprune is not installed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from topoprune.compaction.folders import atomic_folder, check_target
from topoprune.compaction.manifest import CONFIG_NAME, is_model_file
from topoprune.compaction.onnx_export import Exporter, export_onnx
from topoprune.compaction.uniform import uniform_model

__all__ = ["Format", "export"]

Format = Literal["onnx", "transformers"]
_LOG = logging.getLogger("topoprune")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    uniform: bool = False,
    format: Format | None = None,
    exporter: Exporter | None = None,
    opset: int | None = None,
    example: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a compacted or dense model as a stock transformers folder (``uniform=True``) or an ONNX file.

    A uniform folder holds the smallest shape that stock transformers can load and that contains every layer:
    layers with fewer heads or neurons are padded with zeros, so the function stays the same. Which sizes a
    family can say is told in `topoprune.compaction.uniform`; `uniform_shape` says what comes out.

    An ONNX file takes any batch size and length; it keeps the shape of every layer. It is run by onnxruntime, if
    that is installed, and compared with the model before it gets its name.

    Args:
        model: a transformers model with any task head, compacted or dense (masked: `compact` it first).
        path: folder, or file whose name ends in ``.onnx``. Replaced as a whole; a folder must be new, empty or
            hold a model.
        uniform: pad to a uniform shape. Needed for folders (`topoprune.save` writes the others).
        format: ``"onnx"`` or ``"transformers"``; None goes by the name.
        exporter: of ONNX: ``"dynamo"`` (default) or ``"torchscript"`` (older, some twenty times as fast, up to 2 GB).
        opset: of ONNX; None is torch's default for the exporter.
        example: input name -> tensor with at least two rows: what an ONNX model takes, and one more check.
            None makes ids and masks (images) up from the config.
        tolerance: of ONNX: largest difference between onnxruntime and torch, relative to the largest output
            (default 1e-4).
        max_shard_size: largest weights file of a folder; None is transformers' default.

    Returns:
        The path.

    Raises:
        ValueError: a model or family that cannot be written so, options of the other format, a folder with
            something else in it, float16 or bfloat16 for ONNX.
        ImportError: ``onnx`` or ``onnxscript`` is missing.
        RuntimeError: torch cannot trace the model, or onnxruntime computes something else.
        OSError: no permission, no space. Nothing is written in any of these cases.

    Complexity: O(parameters); ONNX some seconds a layer besides ("dynamo").

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from topoprune import compact, extract, solve
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> model = BertModel(config).eval()
        >>> smaller = compact(model, solve(extract(model, include=("neurons",)), budget=5, problem="neurons"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     type(AutoModel.from_pretrained(export(smaller, f"{folder}/stock", uniform=True))).__name__
        'BertModel'
    """
    target = Path(path)
    onnx_only = {"exporter": exporter, "opset": opset, "example": example, "tolerance": tolerance}
    if _format(target, uniform, format) == "onnx":
        _refuse("max_shard_size", max_shard_size, "transformers folders")
        return export_onnx(
            uniform_model(model)[0] if uniform else model,
            target,
            exporter=exporter or "dynamo",
            opset=opset,
            example=example,
            tolerance=1e-4 if tolerance is None else tolerance,
        )
    for name, value in onnx_only.items():
        _refuse(name, value, "ONNX files")
    folder = check_target(path, CONFIG_NAME)
    stock, shape = uniform_model(model)
    with atomic_folder(folder, is_model_file) as temporary:
        _write(stock, temporary, {} if max_shard_size is None else {"max_shard_size": max_shard_size})
    _LOG.info("exported %s to %s: %s", type(stock).__name__, target, shape)
    return target


def _format(target: Path, uniform: bool, format: Format | None) -> Format:
    if format not in (None, "onnx", "transformers"):
        raise ValueError(f"unknown format {format!r}; choose from onnx, transformers")
    chosen: Format = format or ("onnx" if target.suffix.lower() == ".onnx" else "transformers")
    if chosen == "transformers" and not uniform:
        raise ValueError(
            f"{target} names a folder: stock transformers can only hold uniform shapes, pass uniform=True; "
            "topoprune.save keeps the shape of every layer, and a name ending in .onnx asks for ONNX"
        )
    return chosen


def _refuse(name: str, value: Any, where: str) -> None:
    if value is not None:
        raise ValueError(f"{name}={value!r} is an option of {where}; leave it out")


def _write(stock: Any, folder: Path, sharding: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError

    stock.config._name_or_path = ""  # a path of this machine is nobody else's business
    try:
        stock.save_pretrained(folder, **sharding)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written: {error}; nothing was changed") from error
