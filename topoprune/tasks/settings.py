"""Settings of a training run that are the same for every task."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

__all__ = ["PRECISIONS", "SCHEDULERS", "Training"]

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Training:
    """Settings of a run; the defaults are for fine-tuning a small pretrained encoder.

    Args:
        epochs: passes over the training data, > 0.
        batch_size: examples per forward; an optimizer step takes `gradient_accumulation` of them.
        learning_rate: its peak.
        warmup: share of the steps it rises over, in [0, 1).
        weight_decay: of AdamW.
        max_length: tokens; longer texts are cut.
        seed: of order, dropout, new weights and the solvers.
        save_steps: steps between checkpoints, or None: only Ctrl-C leaves one.
        scheduler: how the learning rate falls after its peak, one of `SCHEDULERS`.
        gradient_accumulation: batches per optimizer step.
        max_grad_norm: gradients are clipped to this norm; 0 clips nothing.
        precision: ``"fp32"``, ``"bf16"`` (autocast) or ``"fp16"`` (autocast with a gradient scaler; needs a GPU).
        max_steps: optimizer steps at most, or None: as many as `epochs` makes.
        eval_batch_size: examples per forward where nothing is learnt; default: four times `batch_size`.

    Raises:
        ValueError: numbers out of range, or an unknown choice.
    """

    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_length: int = 128
    seed: int = 0
    save_steps: int | None = None
    scheduler: str = "linear"
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_steps: int | None = None
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number > 0")
        for name in ("batch_size", "save_steps", "gradient_accumulation", "max_steps", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number >= 1")
        if self.max_length < 4:
            raise ValueError(f"max_length is {self.max_length!r}; expected at least 4 tokens")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup!r}; expected a share of the steps in [0, 1)")
        if not self.weight_decay >= 0 or self.seed < 0:
            raise ValueError("weight_decay and seed must be >= 0")
        if not 0 <= self.max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r}; expected a number >= 0 (0 clips nothing)")
        for name, allowed in (("scheduler", SCHEDULERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def resumable(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed.

        Settings that came later than the first release count only where they are set: folders of earlier runs
        stay readable.
        """
        late = ("scheduler", "gradient_accumulation", "max_grad_norm", "precision", "max_steps")
        plain = {field.name: field.default for field in fields(self)}
        skipped = {"save_steps", "eval_batch_size", *(name for name in late if getattr(self, name) == plain[name])}
        return {name: value for name, value in self.to_dict().items() if name not in skipped}
