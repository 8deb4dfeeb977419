"""ONNX files with dynamic batch and length, compared in onnxruntime before they get their name."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from topoprune.compaction.uniform import check_one_device
from topoprune.files import atomic_path
from topoprune.masks import unwrap

__all__ = ["Exporter", "export_onnx"]

Exporter = Literal["dynamo", "torchscript"]
# A protobuf holds 2 GiB; above this the weights lie in a file of their own.
_SINGLE_FILE_BYTES = 2**31 - 2**26
_TRACED = (2, 6)  # batch and length: not 1, which tracing takes for a constant
_CHECKED = ((1, 1), (1, 9), (3, 4), (2, 7))
_INSTALL = 'pip install "topoprune[onnx]"'
_OPSET = {"dynamo": None, "torchscript": 17}


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    exporter: Exporter = "dynamo",
    opset: int | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write a transformers model as ``path``; see `topoprune.export`.

    Inputs: ``input_ids`` and ``attention_mask``; ``token_type_ids`` where the model has more than one type,
    ``decoder_input_ids`` for encoder-decoders; ``pixel_values`` for images, whose size is fixed. Outputs: what the
    model calls logits, else all of its tensors; no cache. Over 2 GB the weights lie beside the file as
    ``NAME.<random>.data``, which the file names.

    Args, Raises: see `topoprune.export`.
    """
    model = unwrap(model)
    if exporter not in _OPSET:
        raise ValueError(f"unknown exporter {exporter!r}; choose from {', '.join(_OPSET)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected a number > 0, e.g. 1e-4")
    _check_model(model, exporter)
    _check_place(path)
    _check_installed()
    twin = _twin(model)
    batches = [_batch(twin, *shape, seed=seed) for seed, shape in enumerate((_TRACED, *_CHECKED))]
    if example is not None:
        batches = [_checked_example(twin, example), *_slices(example)]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / "model.onnx"
        wrapped = _Positional(twin, tuple(batches[0])).eval()
        names = wrapped.learn_outputs(batches[0])
        with _quiet():
            try:
                _write(wrapped, batches[0], names, draft, exporter, opset)
            except Exception as error:  # torch raises many types here
                other = next(name for name in _OPSET if name != exporter)
                raise RuntimeError(
                    f"torch cannot export this {type(model).__name__} to ONNX by exporter={exporter!r}: "
                    f"{_first_line(error)}; try exporter={other!r}. Nothing was written"
                ) from error
        _keep_inputs(draft, batches[0])
        _compare(draft, wrapped, batches, names, tolerance)
        _move(draft, path)
    return path


# -- before ----------------------------------------------------------------------------------------


def _check_model(model: nn.Module, exporter: str) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"export writes transformers models, found a {type(model).__name__}; use torch.onnx.export")
    check_one_device(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}, which onnxruntime cannot run everywhere; export model.float() and "
                "convert the file afterwards"
            )
    if exporter == "torchscript" and _bytes(model) > _SINGLE_FILE_BYTES:
        raise ValueError(f"the weights have {_bytes(model):,} bytes; over 2 GB use exporter='dynamo'")


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file, e.g. {path / 'model.onnx'}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write to {path.parent}")


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}; install with: {_INSTALL}")


def _twin(model: Any) -> Any:
    """Return a model with the same tensors, in eval mode, with plain attention and no cache."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    # Its graph is the one that onnxruntime fuses; T5 with sdpa cannot be traced.
    twin.set_attn_implementation("eager")
    for name, module in list(twin.named_modules()):
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config.use_cache = False
        if type(module).__name__.endswith("Conv1D") and getattr(module, "nf", 1) == 0:
            twin.set_submodule(name, _NoOutputs())
    return twin


class _NoOutputs(nn.Module):
    """A projection to nothing: Conv1D reshapes to size 0, which ONNX reads as "the size that was there"."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., 0) for (..., features)."""
        return hidden[..., :0]


# -- inputs ----------------------------------------------------------------------------------------


def _batch(model: Any, batch: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Return inputs for a shape: row b ends in b padding tokens, at least one token is real."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        sides = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        images = torch.randn(batch, config.num_channels, *sides, generator=generator)
        return {"pixel_values": images.to(model.device)}
    limit = getattr(config, "max_position_embeddings", None)
    length = min(length, limit // 2) if isinstance(limit, int) and limit > 1 else length
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0

    def tokens(steps: int, high: int) -> torch.Tensor:
        return torch.randint(0, high, (batch, steps), generator=generator)

    mask = (torch.arange(length) < length - torch.arange(batch)[:, None]).long()
    mask[:, 0] = 1
    ids = tokens(length, config.vocab_size)
    ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    result = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    if "token_type_ids" in accepted and (getattr(config, "type_vocab_size", None) or 1) > 1:
        result["token_type_ids"] = tokens(length, config.type_vocab_size)
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        result["decoder_input_ids"] = tokens(length + 2 if length > 1 else 1, config.vocab_size)
    return {name: tensor.to(model.device) for name, tensor in result.items()}


def _checked_example(model: Any, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    accepted = inspect.signature(model.forward).parameters
    for name, tensor in example.items():
        if name not in accepted:
            raise ValueError(f"{type(model).__name__} takes no input {name!r}; it takes {', '.join(accepted)}")
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2 or tensor.shape[0] < 2:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"example[{name!r}] is {found}; expected a tensor of at least two rows")
    if not example:
        raise ValueError("example is empty; give input name -> tensor, or None")
    return {name: tensor.to(model.device) for name, tensor in example.items()}


def _slices(example: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return smaller batches of an example: one row, and shorter ids."""
    one = {name: tensor[:1] for name, tensor in example.items()}
    shorter = {name: t[:, : max(1, t.shape[1] - 1)] if t.ndim == 2 else t for name, t in example.items()}
    return [one, {name: torch.cat([tensor, tensor]) for name, tensor in shorter.items()}]


def _axes(name: str, tensor: torch.Tensor) -> dict[int, str]:
    """Return axis -> name of the dynamic axes of an input."""
    if tensor.ndim != 2:
        return {0: "batch"}
    return {0: "batch", 1: "target_length" if name.startswith("decoder_") else "length"}


# -- tracing ---------------------------------------------------------------------------------------


class _Positional(nn.Module):
    """A transformers model with inputs by position and a tuple of tensors as its output."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs: tuple[str, ...] = ()

    def learn_outputs(self, batch: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Return the names of the outputs: those called logits, else all tensors."""
        with torch.no_grad():
            found = self.model(**batch, return_dict=True)
        tensors = tuple(name for name, value in found.items() if isinstance(value, torch.Tensor))
        self.outputs = tuple(name for name in tensors if name.endswith("logits")) or tensors
        return self.outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs in the order of their names."""
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


def _write(
    wrapped: _Positional,
    batch: Mapping[str, torch.Tensor],
    names: tuple[str, ...],
    draft: Path,
    exporter: Exporter,
    opset: int | None,
) -> None:
    axes = {name: _axes(name, tensor) for name, tensor in batch.items()}
    common: dict[str, Any] = {"input_names": list(batch), "output_names": list(names), "verbose": False}
    common["opset_version"] = opset or _OPSET[exporter]
    if exporter == "torchscript":
        torch.onnx.export(wrapped, tuple(batch.values()), str(draft), dynamo=False, dynamic_axes=axes, **common)
        return
    dims = {name: torch.export.Dim(name) for named in axes.values() for name in named.values()}
    shapes = tuple({axis: dims[name] for axis, name in named.items()} for named in axes.values())
    program: Any = torch.onnx.export(wrapped, tuple(batch.values()), dynamo=True, dynamic_shapes=(shapes,), **common)
    program.save(str(draft), external_data=_bytes(wrapped) > _SINGLE_FILE_BYTES)


def _keep_inputs(draft: Path, batch: Mapping[str, torch.Tensor]) -> None:
    """Give the file every input, also those that nothing reads any more (a mask where no heads are left)."""
    import onnx

    proto = onnx.load(str(draft), load_external_data=False)
    there = {value.name: value for value in proto.graph.input}
    if set(there) == set(batch):
        return
    del proto.graph.input[:]
    for name, tensor in batch.items():
        dims = [_axes(name, tensor).get(axis, size) for axis, size in enumerate(tensor.shape)]
        kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.cpu().numpy().dtype)
        proto.graph.input.append(there.get(name) or onnx.helper.make_tensor_value_info(name, kind, dims))
    onnx.save(proto, str(draft))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # What tracing warns of (constants, deprecations) is answered by the comparison that follows.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException) -> str:
    """Return what went wrong, without the advice that torch puts around it."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"


# -- after -----------------------------------------------------------------------------------------


def _compare(
    draft: Path, wrapped: _Positional, batches: list[dict[str, torch.Tensor]], names: tuple[str, ...], tolerance: float
) -> None:
    """Raise RuntimeError unless onnxruntime computes what torch computes, for every batch."""
    if find_spec("onnxruntime") is None:
        warnings.warn(
            "onnxruntime is not installed: the ONNX file was not compared with the model (pip install onnxruntime)",
            stacklevel=4,
        )
        return
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
        for batch in batches:
            with torch.no_grad():
                expected = wrapped(*batch.values())
            found = session.run(list(names), {name: tensor.cpu().numpy() for name, tensor in batch.items()})
            for name, torch_output, onnx_output in zip(names, expected, found, strict=True):
                _check_equal(name, torch_output.cpu(), torch.from_numpy(onnx_output), batch, tolerance)
    except RuntimeError:
        raise
    except Exception as error:  # onnxruntime has types of its own
        raise RuntimeError(
            f"onnxruntime cannot run the exported model: {_first_line(error)}. Nothing was written"
        ) from error


def _check_equal(
    name: str, expected: torch.Tensor, found: torch.Tensor, batch: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in batch.items()}
    if expected.shape != found.shape:
        raise RuntimeError(
            f"the ONNX model returns {name} of shape {tuple(found.shape)} for inputs {shapes}, torch "
            f"{tuple(expected.shape)}. Nothing was written"
        )
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    apart = float((expected - found).abs().max()) if expected.numel() else 0.0
    if not apart <= tolerance * max(scale, 1e-6) or not math.isfinite(scale):
        raise RuntimeError(
            f"the ONNX model's {name} differs from torch's by {apart:.3g} (largest value {scale:.3g}, tolerance "
            f"{tolerance:g} of it) for inputs {shapes}. Nothing was written; try the other exporter"
        )


def _move(draft: Path, path: Path) -> None:
    """Give the file its name; weights beside it first, under a name that the old file does not use."""
    data = [file for file in draft.parent.iterdir() if file != draft]
    name = f"{path.name}.{secrets.token_hex(4)}.data"
    if data:
        import onnx

        proto = onnx.load(str(draft), load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name
        onnx.save(proto, str(draft))
        assert len(data) == 1, data
        os.replace(data[0], path.with_name(name))
    try:
        with atomic_path(path) as temporary:
            os.replace(draft, temporary)
    except BaseException:
        path.with_name(name).unlink(missing_ok=True)
        raise
    old = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    for file in path.parent.iterdir():
        if old.fullmatch(file.name) and file.name != name:
            file.unlink()
