"""Second moments of what the units feed into their consumers, streamed over batches.

Shape legend: B batch, T tokens, f consumer inputs (units * unit width).
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from topoprune.architectures import model_config
from topoprune.extraction.memory import is_out_of_memory, release_cached
from topoprune.graph import Site

__all__ = ["GramCollector", "collect_gram", "decoder_mask"]

_PANEL = 768  # columns of one accumulation: large enough for a fast product, small enough to skip half


class GramCollector:
    """Accumulate E[o oᵀ] over non-padding tokens at the consumers' inputs, by forward hooks.

    Works in any forward of the model, training ones included: it detaches, upcasts to float32,
    switches autocast off for its own products, and ignores the recomputation of gradient
    checkpointing (anything outside the model's own forward). What is real and what is padding is
    read from ``attention_mask``; without one every token counts (images: all patches and the class
    token). In encoder-decoder models the decoder's tokens (cross attention included) are those of
    ``decoder_attention_mask``, else of token ``labels != -100`` (the positions that predict a label,
    however the family shifts labels into decoder inputs), else, where the decoder reads the shifted
    ``input_ids``, those of ``attention_mask``, else all.

    Args:
        model: the model that will be called.
        sites: sites with a consumer; others are ignored.
        max_tokens: stop a site after exactly that many tokens; None for all.
        diagonal: names of sites that only need E[o²], an (f,) vector.
        grad_only: pass over forwards without gradients (an evaluation between training steps).
        clock: what `seconds`, the time spent collecting, is measured with.

    Memory: f * f * 4 bytes per site, f * 4 for diagonal ones.

    Example:
        >>> from topoprune.graph import TensorSlice
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
        >>> site = Site("ffn", "neuron", 2, 1, (TensorSlice("0.weight", 0, "in", (2, 3)),),
        ...             (TensorSlice("2.weight", 1, "out", (3, 2)),), consumer="2")
        >>> with GramCollector(model, [site]) as collector:
        ...     _ = model(torch.ones(4, 3))
        >>> collector.tokens, tuple(collector.moment("ffn").shape)
        ({'ffn': 4}, (2, 2))
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        *,
        max_tokens: int | None = None,
        diagonal: Collection[str] = frozenset(),
        grad_only: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
        self.sites = {site.name: site for site in sites if site.consumer is not None}
        unknown = sorted(set(diagonal) - set(self.sites))
        if unknown:
            raise ValueError(f"diagonal names unknown sites {unknown}; known: {', '.join(self.sites)}")
        self.max_tokens = max_tokens
        self.diagonal = frozenset(diagonal)
        self.grad_only = grad_only
        self.seconds = 0.0
        self._clock = clock
        self.tokens: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, tuple[torch.Tensor, int] | None] = {}
        self._inside = False
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        top = getattr(model, "_orig_mod", model)
        self._signature = inspect.signature(top.forward)
        self._two_stacks = bool(getattr(model_config(model), "is_encoder_decoder", False))
        self.reset()
        self._hooks = [
            top.register_forward_pre_hook(self._enter, with_kwargs=True),
            top.register_forward_hook(self._leave),
        ]
        for site in self.sites.values():
            assert site.consumer is not None
            self._hooks.append(model.get_submodule(site.consumer).register_forward_pre_hook(self._hook(site)))

    @property
    def done(self) -> bool:
        """Whether every site has its `max_tokens`."""
        return self.max_tokens is not None and all(count >= self.max_tokens for count in self.tokens.values())

    def moment(self, name: str) -> torch.Tensor:
        """Return E[o oᵀ] (f, f), or E[o²] (f,) for a diagonal site: a new float32 tensor.

        Raises:
            ValueError: no token of the site was seen, or the moment is not finite.
        """
        if name not in self.sites:
            raise KeyError(f"unknown site {name!r}; known: {', '.join(self.sites)}")
        if not self.tokens[name]:
            raise ValueError(self._why_nothing(name))
        moment = self._sums[name] / self.tokens[name]
        if moment.ndim == 2:
            _mirror(moment)
        if not torch.isfinite(moment.sum()):
            raise ValueError(f"activations at {self.sites[name].consumer!r} (site {name!r}) are not finite")
        return moment

    def _why_nothing(self, name: str) -> str:
        if not any(self.tokens.values()):
            return f"no tokens seen at site {name!r}: run forwards of the model first"
        return (
            f"no tokens seen at site {name!r}: {self.sites[name].consumer!r} did not run while others did (a decoder "
            "alone runs its cross attention only with encoder_hidden_states; layerdrop skips layers at random); "
            "feed more batches, or pass sites=[...] without it"
        )

    def reset(self) -> None:
        """Forget all tokens; frees the accumulators."""
        self._sums = {}
        self.tokens = dict.fromkeys(self.sites, 0)

    def discard(self, name: str) -> None:
        """Free the accumulator of one site and set its count to zero."""
        self._sums.pop(name, None)
        self.tokens[name] = 0

    def reduce(self, add: Callable[[torch.Tensor], Any]) -> None:
        """Take in what other collectors saw of the same sites.

        Args:
            add: called with every count and every sum, site by site, to change it in place (such as ``all_reduce``).
        """
        for name, site in self.sites.items():
            width = site.n_units * site.unit_width
            count = torch.tensor([self.tokens[name]], device=self._device)
            if name not in self._sums:
                shape = (width,) if name in self.diagonal else (width, width)
                self._sums[name] = torch.zeros(shape, device=self._device)
            add(count)
            add(self._sums[name])
            self.tokens[name] = int(count)

    def state_dict(self) -> dict[str, Any]:
        """Return sums and token counts; loading them continues exactly."""
        return {"sums": {name: total.clone() for name, total in self._sums.items()}, "tokens": dict(self.tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` output.

        Raises:
            ValueError: the state is of other sites or shapes.
        """
        if set(state["tokens"]) != set(self.sites):
            raise ValueError(f"state is of sites {sorted(state['tokens'])}, expected {sorted(self.sites)}")
        for name, total in state["sums"].items():
            site = self.sites[name]
            width = site.n_units * site.unit_width
            expected = (width,) if name in self.diagonal else (width, width)
            if tuple(total.shape) != expected:
                raise ValueError(f"state of site {name!r} has shape {tuple(total.shape)}, expected {expected}")
        self.tokens = {name: int(count) for name, count in state["tokens"].items()}
        self._sums = {name: total.clone() for name, total in state["sums"].items()}

    def close(self) -> None:
        """Remove all hooks; what was collected stays readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> GramCollector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = torch.is_grad_enabled() or not self.grad_only
        if not self._inside or self.done:
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        # Unnamed keywords of forward(**kwargs) arrive nested under the name of the parameter.
        given = {**given, **kwargs}
        mask = given.get("attention_mask")
        self._rows = {"encoder": _real_rows("attention_mask", mask)}
        self._rows["decoder"] = self._rows["encoder"]
        if self._two_stacks:
            self._rows["decoder"] = _real_rows("decoder_attention_mask", decoder_mask(given))

    def _leave(self, *_: object) -> None:
        self._inside = False

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._inside and not (self.max_tokens is not None and self.tokens[site.name] >= self.max_tokens):
                started = self._clock()
                self._add(site, args[0])
                self.seconds += self._clock() - started

        return collect

    @torch.no_grad()
    def _add(self, site: Site, inputs: torch.Tensor) -> None:
        width = site.n_units * site.unit_width
        if inputs.shape[-1] != width:
            raise ValueError(
                f"input of {site.consumer!r} has width {inputs.shape[-1]}, site {site.name!r} says {width}"
            )
        x = inputs.detach().reshape(-1, width)
        mask = self._rows[site.stack]
        if mask is not None:
            rows, total = mask
            if total != len(x):
                raise ValueError(f"the mask has {total} tokens, the input of {site.consumer!r} has {len(x)}")
            if len(rows) < total:
                x = x.index_select(0, rows.to(x.device))
        if self.max_tokens is not None:
            x = x[: self.max_tokens - self.tokens[site.name]]
        self.tokens[site.name] += len(x)
        # Autocast would round the products; an accumulator born in inference mode could not be
        # updated outside of it.
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            total_sum = self._sums.get(site.name)
            if total_sum is None or total_sum.device != x.device:
                zero = torch.zeros((width,) if site.name in self.diagonal else (width, width), device=x.device)
                self._sums[site.name] = zero if total_sum is None else zero.copy_(total_sum)
            self._add_rows(site, x)

    def _add_rows(self, site: Site, x: torch.Tensor) -> None:
        """Add tokens to a site's sum; in halves where their float32 copies do not fit into memory."""
        total = self._sums[site.name]
        try:
            # All that is allocated; the sums are untouched until it is there.
            wide = _squares(x) if site.name in self.diagonal else _wide(x)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(x) <= 1:
                raise
            wide = None
        if wide is None:
            release_cached()
            warnings.warn(
                f"out of memory while collecting {len(x)} tokens at {site.consumer!r}; going on with half as many at a "
                "time: the same result, slower",
                stacklevel=2,
            )
            middle = len(x) // 2
            self._add_rows(site, x[:middle])
            self._add_rows(site, x[middle:])
        elif wide.ndim == 1:
            total.add_(wide)
        else:
            _accumulate(total, wide)


def decoder_mask(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Return what tells the real tokens of an encoder-decoder model's decoder, or None for all."""
    mask, labels = given.get("decoder_attention_mask"), given.get("labels")
    if mask is not None:
        return mask
    # Classes and scores of whole sequences are labels too: (batch,), or floats (batch, classes).
    if labels is not None and labels.ndim > 1 and not labels.is_floating_point():
        return labels != -100
    own = given.get("decoder_input_ids"), given.get("decoder_inputs_embeds")
    return given.get("attention_mask") if all(value is None for value in own) else None


def _real_rows(name: str, mask: torch.Tensor | None) -> tuple[torch.Tensor, int] | None:
    """Return (indices of real tokens in the flattened batch, all tokens), or None for all."""
    if mask is None:
        return None
    if mask.ndim not in (2, 3):  # three axes: (batch, choices, length), which multiple-choice heads flatten
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected (batch, length) with 1 for real tokens")
    return (mask.reshape(-1) != 0).nonzero().squeeze(1), mask.numel()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float()


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.float().square().sum(dim=0)


def _accumulate(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += xᵀ x, panels on and right of the diagonal only: half of the work at large f."""
    for start in range(0, total.shape[0], _PANEL):
        stop = start + _PANEL
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _mirror(moment: torch.Tensor) -> None:
    """Fill the part that `_accumulate` leaves out, and make the diagonal blocks exactly symmetric."""
    for start in range(0, moment.shape[0], _PANEL):
        stop = start + _PANEL
        diagonal = moment[start:stop, start:stop].triu()
        moment[start:stop, start:stop] = diagonal + diagonal.triu(1).T
        moment[stop:, start:stop] = moment[start:stop, stop:].T


def collect_gram(
    model: nn.Module,
    sites: Iterable[Site],
    calibration: Iterable[Mapping[str, torch.Tensor]],
    *,
    max_bytes: int = 2**30,
    max_tokens: int | None = None,
    diagonal: Collection[str] = frozenset(),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (site name, E[o oᵀ]) for every site, running the model in eval mode without gradients.

    Sites are grouped so that the accumulators of a group fit `max_bytes`; each group is one pass
    over the calibration batches. Use ``dict(collect_gram(...))`` only if all moments fit at once.
    The training flag of every module is put back before anything is yielded.

    Args:
        model: the model.
        sites: sites; those without a consumer are skipped.
        calibration: batches (dicts of tensors, `BatchEncoding` too), moved to the model's device;
            one batch alone is accepted, an iterator is turned into a list.
        max_bytes: bytes of accumulators in flight; the yielded moment is one copy on top.
        max_tokens: exact number of tokens per site; None for all.
        diagonal: names of sites that only need E[o²].

    Raises:
        ValueError: an empty calibration set, a batch that is not a dict of tensors, a site whose
            accumulator alone exceeds `max_bytes`.
    """
    wanted = [site for site in sites if site.consumer is not None]
    groups = _groups(wanted, max_bytes, frozenset(diagonal))
    batches = _batches(calibration)
    return _collect(model, groups, batches, max_tokens, frozenset(diagonal))


def _collect(
    model: nn.Module,
    groups: list[list[Site]],
    batches: Iterable[Mapping[str, torch.Tensor]],
    max_tokens: int | None,
    diagonal: frozenset[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    waiting = list(groups)
    while waiting:
        group = waiting.pop(0)
        own = diagonal & {site.name for site in group}
        fits = True
        try:
            with GramCollector(model, group, max_tokens=max_tokens, diagonal=own) as collector:
                _run(model, collector, batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(group) == 1:
                raise
            fits = False
        if not fits:
            collector.reset()
            release_cached()
            middle = len(group) // 2
            waiting[:0] = [group[:middle], group[middle:]]
            warnings.warn(
                f"out of memory with the accumulators of {len(group)} sites; going on with {middle} at a time: the "
                "same result, slower (more passes over the calibration batches)",
                stacklevel=2,
            )
            continue
        for site in group:
            moment = collector.moment(site.name)
            collector.discard(site.name)
            yield site.name, moment


def _run(model: nn.Module, collector: GramCollector, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    top = getattr(model, "_orig_mod", model)
    flags = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    seen = 0
    try:
        model.eval()
        with torch.no_grad():
            for seen, batch in enumerate(batches, start=1):
                top(**_on_device(batch, device, seen - 1))
                if collector.done:
                    break
    finally:
        for module, flag in flags.items():
            module.training = flag
    if not seen:
        raise ValueError("calibration set is empty; pass at least one batch, e.g. calibration=[tokenizer(texts, ...)]")


def _on_device(batch: Any, device: torch.device, index: int) -> dict[str, torch.Tensor]:
    if not isinstance(batch, Mapping):
        # transformers' BatchEncoding is a UserDict, which is a Mapping.
        raise ValueError(f"calibration batch {index} is a {type(batch).__name__}, expected a dict of tensors")
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"calibration batch {index} has {key}={type(value).__name__}, expected a tensor "
                "(with a tokenizer: return_tensors='pt')"
            )
    return {key: value.to(device) for key, value in batch.items()}


def _batches(calibration: Any) -> Iterable[Mapping[str, torch.Tensor]]:
    if isinstance(calibration, Mapping):
        return [calibration]
    if not hasattr(calibration, "__iter__") and not hasattr(calibration, "__getitem__"):
        raise ValueError(f"calibration is a {type(calibration).__name__}, expected an iterable of batches")
    # A one-shot iterator would be empty in the second pass. No iter() here: a DataLoader starts its workers on it.
    batches = list(calibration) if isinstance(calibration, Iterator) else calibration
    if isinstance(batches, Sequence) and not len(batches):
        raise ValueError("calibration set is empty; pass at least one batch, e.g. calibration=[tokenizer(texts, ...)]")
    return batches


def _groups(sites: list[Site], max_bytes: int, diagonal: frozenset[str]) -> list[list[Site]]:
    groups: list[list[Site]] = []
    room = 0
    for site in sites:
        width = site.n_units * site.unit_width
        need = 4 * width * (1 if site.name in diagonal else width)
        if need > max_bytes:
            raise ValueError(
                f"site {site.name!r} needs an accumulator of {need} bytes, max_bytes is {max_bytes}; raise it"
            )
        if need > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(site)
        room -= need
    return groups
