"""Distillation in training: the pruned model also learns from the dense one.

Hooks do all of it: after a training forward of the student, the frozen teacher sees the same inputs, and the
loss in the student's outputs is replaced by the mixed one. Neither a plain loop nor a Trainer notices.

Shape legend: N rows that count (examples, or tokens with a label), V classes or vocabulary, d width.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from topoprune.architectures import model_config
from topoprune.extraction.gram import decoder_mask
from topoprune.graph import Site
from topoprune.masks import unwrap
from topoprune.train.budget_recipe import Distillation

__all__ = ["Distiller", "find_teacher", "snapshot", "weights_fingerprint"]

_NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "shift_labels", "return_dict", "use_cache")


def snapshot(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model in eval mode, on the same device; costs the memory of its weights once more.

    Raises:
        ValueError: a model that cannot be copied (sharded parameters, tensors that are part of a graph).
    """
    model = unwrap(model)
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ValueError("a sharded model cannot be copied as the teacher; pass teacher=, loaded before sharding")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # anything a user hung on the module can refuse to be copied
        raise ValueError(f"the model cannot be copied as the teacher ({error}); pass teacher=") from error
    return twin.requires_grad_(False).eval()


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hex digest of all names, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw.data)
    return digest.hexdigest()


def find_teacher(
    network: nn.Module, recipe: Any, load: Callable[[str], nn.Module], name: str | os.PathLike[str] | None
) -> nn.Module | None:
    """Return the teacher a run asks for by name; None where the model teaches itself, or nobody does.

    Args:
        network: the model, as loaded. recipe: its recipe, or None. load: folder or hub id -> model for the same task.
        name: of the teacher, or None.

    Raises:
        ValueError: a teacher where nothing is distilled; none where the model's head is fresh.
    """
    settings = getattr(recipe, "distill", None)
    if name is not None:
        if settings is None:
            raise ValueError(f"teacher {str(name)!r} has no effect: the recipe does not distil (--distill)")
        return load(str(name))
    built = getattr(model_config(network), "architectures", None) or ()
    if settings is not None and settings.logits and type(network).__name__ not in built:
        raise ValueError(
            f"distillation needs a teacher: {type(network).__name__} has fresh weights here (its files hold "
            f"{', '.join(built) or 'none'}), so a copy of it would teach noise; fine-tune it densely first and give "
            "that as the teacher (--teacher FOLDER), or start from it (--model FOLDER), or leave distillation out"
        )
    return None


class Distiller:
    """Mixes what a teacher says into the loss of a model's training forwards.

    The output's divergence is taken where a label is: over examples (classification), or tokens whose label is not
    -100 (language modelling, sequence to sequence, token classification). Numbers (regression) are compared by
    mean squared error, several independent classes by the divergence of each. Hidden states are the outputs of
    the layers, over real tokens. Under a Trainer that scales losses by ``num_items_in_batch``, all terms are scaled
    the way the model scales its own.

    Args:
        model: the student, live. sites: of it, for where its layers are.
        settings: weights and temperature.
        teacher: the dense model; None: a frozen copy of the student as it is now.

    Raises:
        ValueError: the teacher is the student, has other outputs, or lacks layers that are compared.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], settings: Distillation, teacher: nn.Module | None = None
    ) -> None:
        self.model, self.settings = unwrap(model), settings
        teacher = None if teacher is None else unwrap(teacher)
        self._layers = layer_modules(self.model, sites)
        if teacher is not None:
            _check_teacher(self.model, teacher, self._layers if settings.hidden else {})
        self.teacher = snapshot(self.model) if teacher is None else teacher
        self.parts: dict[str, torch.Tensor] = {}
        self._signature = inspect.signature(self.model.forward)
        self._nested = {n for n, p in self._signature.parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        self._causal = _shifts_labels(self.model, sites)
        self._takes_cache_flag = "use_cache" in inspect.signature(self.teacher.forward).parameters
        self._inside = False
        self._autocast: tuple[bool, torch.dtype] | None = None
        self._mine: dict[tuple[str, int], torch.Tensor] = {}
        self._theirs: dict[tuple[str, int], torch.Tensor] = {}
        self._scales: bool | None = None  # whether the model divides its loss by num_items_in_batch; found out
        self._digest: str | None = None
        self._hooks: list[Any] = []

    @property
    def digest(self) -> str:
        """Fingerprint of the teacher's weights."""
        if self._digest is None:
            self._digest = weights_fingerprint(self.teacher)
        return self._digest

    def attach(self) -> Distiller:
        """Hook into the student and the teacher; returns itself."""
        self.teacher.eval()
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter),
            self.model.register_forward_hook(torch.compiler.disable(self._leave), with_kwargs=True),
        ]
        for key, name in self._layers.items():
            self._hooks.append(self.model.get_submodule(name).register_forward_hook(self._catch(key)))
            if self.settings.hidden:
                hook = self._catch_teacher(key)
                self._hooks.append(self.teacher.get_submodule(name).register_forward_hook(hook))
        return self

    def close(self) -> None:
        """Remove all hooks; the teacher stays as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a saved run learned from this same teacher."""
        if state.get("teacher") != self.digest:
            raise ValueError(
                f"the interrupted run learned from a teacher with digest {str(state.get('teacher'))[:12]}, this one "
                f"has {self.digest[:12]}; pass teacher= with the dense model that run began with, or make the "
                "Pruner on that model before the checkpoint's weights are loaded"
            )

    # -- hooks ----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside = module.training and torch.is_grad_enabled()
        self._autocast = None
        self._mine.clear()

    def _catch(self, key: tuple[str, int]) -> Any:
        def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Outside of the model's own forward it is the recomputation of gradient checkpointing.
            if self._inside:
                hidden = output[0] if isinstance(output, (tuple, list)) else output
                if self._autocast is None:  # accelerate switches autocast on inside of the forward only
                    kind = hidden.device.type
                    self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
                if self.settings.hidden:
                    self._mine[key] = hidden

        return catch

    def _catch_teacher(self, key: tuple[str, int]) -> Any:
        def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._theirs[key] = output[0] if isinstance(output, (tuple, list)) else output

        return catch

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self._inside:
            return None
        self._inside = False
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {k: v for k, v in {**bound, **kwargs}.items() if k not in self._nested}
        task, logits = _loss_and_logits(outputs, given, self.settings)
        if not task.requires_grad:
            return None
        theirs = self._ask_teacher(given, task.device)
        with torch.autocast(task.device.type, enabled=False):
            mixed = self._mix(task, logits, theirs, given)
        self._mine.clear()
        self._theirs.clear()
        if isinstance(outputs, tuple):
            return (mixed, *outputs[1:])
        outputs["loss"] = mixed
        return outputs

    @torch.no_grad()
    def _ask_teacher(self, given: Mapping[str, Any], device: torch.device) -> torch.Tensor | None:
        """Run the teacher on what the student saw, at the same precision, without a loss of its own."""
        if given.get("past_key_values") is not None:
            raise ValueError("distillation cannot share past_key_values with the teacher; train without a cache")
        here = next(self.teacher.parameters(), None)
        if here is not None and here.device != device:
            self.teacher.to(device)
        inputs = {k: v for k, v in given.items() if k not in _NOT_FOR_THE_TEACHER}
        if getattr(model_config(self.model), "is_encoder_decoder", False) and given.get("labels") is not None:
            inputs |= self._decoder_inputs(given)
        inputs["return_dict"] = True
        if self._takes_cache_flag:
            inputs["use_cache"] = False
        on, dtype = self._autocast or (False, torch.float32)
        with torch.autocast(device.type, dtype=dtype if on else None, enabled=on):
            said = self.teacher(**inputs)
        return said.get("logits") if isinstance(said, Mapping) else getattr(said, "logits", None)

    def _decoder_inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if any(given.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            return {}
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        # Whole-sequence heads shift their own input_ids; the teacher does the same.
        if shift is None or given["labels"].ndim < 2:
            return {}
        return {"decoder_input_ids": shift(labels=given["labels"])}

    # -- the loss -------------------------------------------------------------------------------

    def _mix(
        self, task: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor | None, given: Mapping[str, Any]
    ) -> torch.Tensor:
        settings, labels = self.settings, given.get("labels")
        rows = None if labels is None else self._rows(mine, labels, given)
        share = self._share(task, mine, rows, labels, given)
        self.parts = {"task": task.detach()}
        mixed = task.float()
        if settings.logits:
            if theirs is None or theirs.shape != mine.shape:
                found = None if theirs is None else tuple(theirs.shape)
                raise ValueError(f"the teacher's output has shape {found}, the model's {tuple(mine.shape)}")
            apart = share * self._divergence(mine, theirs, labels, rows)
            self.parts["logits"] = apart.detach()
            mixed = (1 - settings.logits) * mixed + settings.logits * apart
        if settings.hidden:
            apart = share * self._hidden_error(given)
            self.parts["hidden"] = apart.detach()
            mixed = mixed + settings.hidden * apart
        return mixed.to(task.dtype)

    def _rows(
        self, logits: torch.Tensor, labels: torch.Tensor, given: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return which rows of the flattened output count, and their labels; None: all entries do."""
        if labels.is_floating_point() or logits.shape[-1] == 1:
            return None
        targets = labels
        if logits.ndim == 3 and given.get("shift_labels") is not None:
            targets = given["shift_labels"]
        elif logits.ndim == 3 and self._causal:
            targets = F.pad(labels, (0, 1), value=-100)[..., 1:]  # a token predicts the next one
        if targets.numel() != math.prod(logits.shape[:-1]):
            raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit outputs of {tuple(logits.shape)}")
        flat = targets.reshape(-1).to(logits.device)
        chosen = (flat != -100).nonzero().squeeze(1)
        return chosen, flat[chosen]

    def _share(
        self, task: torch.Tensor, logits: torch.Tensor, rows: Any, labels: Any, given: Mapping[str, Any]
    ) -> torch.Tensor | float:
        """Return this batch's share in the optimizer step's items, if the model scales its own loss like that.

        Some models divide the sum of losses by ``num_items_in_batch``, others take it and return the mean all
        the same. Which one this is shows in the loss, once it differs from the mean; nothing else tells.
        """
        items = given.get("num_items_in_batch")
        if items is None or rows is None or self._scales is False:
            return 1.0
        chosen, targets = rows
        items = torch.as_tensor(items, device=logits.device).reshape(-1)[0]
        share = chosen.numel() / items
        if self._scales is None:
            with torch.no_grad():
                mean = F.cross_entropy(logits.reshape(-1, logits.shape[-1])[chosen].float(), targets)
            found, plain, ratio = float(task.detach()), float(mean), float(share)
            if not (found > 0 and plain > 0 and ratio > 0) or math.isclose(ratio, 1.0, rel_tol=1e-3):
                return share
            self._scales = abs(math.log(found / (plain * ratio))) < abs(math.log(found / plain))
        return share if self._scales else 1.0

    def _divergence(self, mine: torch.Tensor, theirs: torch.Tensor, labels: Any, rows: Any) -> torch.Tensor:
        """Return T^2 KL(teacher || student), a mean over rows; mean squared error for numbers."""
        warmth = self.settings.temperature
        if rows is not None:
            chosen = rows[0]
            mine_NV, theirs_NV = (t.reshape(-1, t.shape[-1])[chosen].float() / warmth for t in (mine, theirs))
            log_p, log_q = F.log_softmax(theirs_NV, dim=-1), F.log_softmax(mine_NV, dim=-1)
            return warmth**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(1, chosen.numel())
        regression = getattr(model_config(self.model), "problem_type", None) == "regression" or mine.shape[-1] == 1
        if regression or labels is None:
            return F.mse_loss(mine.float(), theirs.float())
        a, b = mine.float() / warmth, theirs.float() / warmth
        p = b.sigmoid()
        apart = p * (F.logsigmoid(b) - F.logsigmoid(a)) + (1 - p) * (F.logsigmoid(-b) - F.logsigmoid(-a))
        return warmth**2 * apart.mean()

    def _hidden_error(self, given: Mapping[str, Any]) -> torch.Tensor:
        """Return the mean over layers of the relative squared error of hidden states, over real tokens."""
        two_stacks = bool(getattr(model_config(self.model), "is_encoder_decoder", False))
        masks = {"encoder": given.get("attention_mask")}
        masks["decoder"] = decoder_mask(given) if two_stacks else masks["encoder"]
        total, layers = torch.zeros(()), 0
        for key, mine in self._mine.items():
            theirs = self._theirs.get(key)
            if theirs is None:  # layer drop
                continue
            if not mine.requires_grad:
                raise ValueError(
                    f"no gradient reaches the hidden states of {self._layers[key]!r}; with gradient checkpointing use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"hidden states of {self._layers[key]!r} have shape {tuple(mine.shape)}, the teacher's "
                    f"{tuple(theirs.shape)}; use a teacher of the same width, or hidden=0"
                )
            error = _relative_error(mine, theirs.to(mine.device), masks[key[0]])
            total, layers = total.to(error.device) + error, layers + 1
        return total / max(1, layers)


def layer_modules(model: nn.Module, sites: Sequence[Site]) -> dict[tuple[str, int], str]:
    """Return (stack, layer) -> name of the innermost module that runs all the layer's sites."""
    owners: dict[tuple[str, int], list[str]] = {}
    for site in sites:
        found = [piece.param.rpartition(".")[0].replace(".", "/") for piece in site.tensors]
        owners.setdefault((site.stack, site.layer), []).extend(found)
    result = {}
    for key, names in owners.items():
        name = os.path.commonpath(names).replace(os.sep, ".") if names else ""
        while name and isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict)):
            name = name.rpartition(".")[0]  # a container has no forward
        if name:
            result[key] = name
    return result


def _relative_error(mine: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    mine_Nd, theirs_Nd = (t.reshape(-1, t.shape[-1]).float() for t in (mine, theirs))
    if mask is not None and mask.ndim in (2, 3):
        if mask.numel() != len(mine_Nd):
            raise ValueError(f"the mask has {mask.numel()} tokens, the hidden states have {len(mine_Nd)}")
        real = (mask.reshape(-1) != 0).nonzero().squeeze(1).to(mine_Nd.device)
        mine_Nd, theirs_Nd = mine_Nd[real], theirs_Nd[real]
    scale = theirs_Nd.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (mine_Nd - theirs_Nd).square().mean() / scale


def _loss_and_logits(
    outputs: Any, given: Mapping[str, Any], settings: Distillation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the task loss and the output of a training forward, or say what is missing."""
    if isinstance(outputs, Mapping):
        loss, logits = outputs.get("loss"), outputs.get("logits")
    elif isinstance(outputs, tuple) and len(outputs) > 1 and given.get("labels") is not None:
        loss, logits = outputs[0], outputs[1]
    else:
        loss = logits = None
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(
            "distillation mixes into the loss that the model returns, and this training forward returned none; pass "
            "labels= to the model (label smoothing and a compute_loss_func of the Trainer take them away)"
        )
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise ValueError("distillation compares outputs.logits, which this model does not return")
    return loss, logits


def _check_teacher(model: nn.Module, teacher: nn.Module, layers: Mapping[tuple[str, int], str]) -> None:
    if teacher is model:
        raise ValueError("the teacher is the model itself; pass another one, or None for a frozen copy")
    mine, theirs = model_config(model), model_config(teacher)
    for name in ("num_labels", "vocab_size", "is_encoder_decoder"):
        a, b = getattr(mine, name, None), getattr(theirs, name, None)
        if a != b:
            raise ValueError(f"the teacher has {name}={b!r}, the model {a!r}; their outputs cannot be compared")
    modules = dict(teacher.named_modules())
    missing = [name for name in layers.values() if name not in modules]
    if missing:
        raise ValueError(
            f"the teacher has no module {missing[0]!r}; hidden states are compared layer by layer: use a teacher of "
            "the same architecture, or hidden=0"
        )


def _shifts_labels(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether token t of the output predicts label t + 1: decoders alone, but for token classification."""
    if getattr(model_config(model), "is_encoder_decoder", False) or "TokenClassification" in type(model).__name__:
        return False
    return any(site.stack == "decoder" for site in sites)
