"""Prune inside `transformers.Trainer`: one callback, no subclassing.

Trainer(model, args, train_dataset=data, callbacks=[TopoPruneCallback(Recipe.budget(sparsity=0.5))])
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from topoprune.masks import unwrap
from topoprune.train.body import Body
from topoprune.train.checkpoint import load_state, save_state
from topoprune.train.distillation import snapshot
from topoprune.train.fixed import FixedPlanRecipe
from topoprune.train.pruner import Pruner, SolveEvent, live_of_state, sites_of_state
from topoprune.train.recipe import BudgetRecipe, NeuroPruneRecipe

__all__ = ["STATE_FILE", "TopoPruneCallback"]

STATE_FILE = "topoprune_pruner.safetensors"


class TopoPruneCallback(TrainerCallback):
    """Runs a recipe under `transformers.Trainer`, saves and resumes with its checkpoints.

    Sparsity, heads kept, solver gap and seconds appear in the Trainer's log history and its
    progress output under ``topoprune/…``; a log is written after every decision. Reporters that
    come before this callback (TensorBoard, W&B) see them too after `lead(trainer)`.

    Args:
        recipe: from `Recipe.neuroprune`, `Recipe.budget` or `Recipe.fixed`.
        seed: for solvers that draw random numbers.
        resume_from: checkpoint folder to take the pruner state from, if training resumes from
            somewhere other than ``output_dir/checkpoint-<step>``.
        compact: cut out at once what a decision prunes (T10, see `Pruner`); checkpoints hold the smaller
            model. To resume, give the checkpoint here (`resume_from`), so that the dense model the Trainer was
            made with takes its shapes, or give the Trainer ``topoprune.load(checkpoint)`` as its model. On several
            processes call `lead(trainer)` too.
        teacher: the dense model to learn from, where the recipe says ``distill`` (see `Pruner`). Default: a frozen
            copy of the model the Trainer is made with, taken then, so it should be fine-tuned already. A resumed
            run finds it again by making the Trainer with the same model as before.
    """

    def __init__(
        self,
        recipe: NeuroPruneRecipe | BudgetRecipe | FixedPlanRecipe,
        *,
        seed: int = 0,
        resume_from: str | None = None,
        compact: bool = False,
        teacher: nn.Module | None = None,
    ) -> None:
        self.recipe, self.seed, self.resume_from, self.compact = recipe, seed, resume_from, compact
        self.teacher = teacher
        self._dense: nn.Module | None = None  # the copy that teaches by default
        self.pruner: Pruner | None = None
        self._news: SolveEvent | None = None
        self._saved = -1  # step of the newest checkpoint with our state
        self._trainer: Any = None

    def lead(self, trainer: Any) -> TopoPruneCallback:
        """Move this callback before the Trainer's reporters, so that they see its figures."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        # Behind the one that says when to save: this callback writes its state before the Trainer does.
        flow = [i for i, known in enumerate(callbacks) if isinstance(known, DefaultFlowCallback)]
        callbacks.insert(flow[0] + 1 if flow else 0, self)
        self._trainer = trainer
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the model the shapes of the checkpoint that training will resume from.

        The Trainer loads a checkpoint's weights before it tells callbacks that training begins.
        """
        folder = self.resume_from or args.resume_from_checkpoint
        model = kwargs.get("model")
        if model is not None and self.teacher is None and getattr(self.recipe, "distill", None) is not None:
            self._dense = snapshot(model)
        if self.compact and model is not None and isinstance(folder, str) and (Path(folder) / STATE_FILE).is_file():
            saved = load_state(Path(folder) / STATE_FILE)
            sites = sites_of_state(saved)
            if sites is not None:
                Body(unwrap(model), sites).take_shape(live_of_state(saved))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the pruner, attach it, and on resume load its state."""
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True would bring back weights from before the last pruning decision; "
                "set it to False and evaluate the final model"
            )
        if self.compact and args.world_size > 1 and self._trainer is None:
            raise ValueError("compact=True on several processes needs the replica: call callback.lead(trainer) first")
        per_epoch = _steps_per_epoch(args, state, kwargs.get("train_dataloader"))
        self.pruner = Pruner(
            kwargs["model"] if self._trainer is None else self._trainer.model_wrapped,
            self.recipe,
            total_steps=state.max_steps,
            steps_per_epoch=per_epoch,
            seed=self.seed,
            compact=self.compact,
            teacher=self._dense if self.teacher is None else self.teacher,
            resume=load_state(self._state_path(args, state)) if state.global_step > 0 else None,
        )
        self.pruner.on_solve = self._remember
        try:
            self.pruner.attach(kwargs["optimizer"])
        except Exception:
            self.pruner.close()
            raise

    def _state_path(self, args: TrainingArguments, state: TrainerState) -> Path:
        folders = [self.resume_from, args.resume_from_checkpoint]
        folders.append(str(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"))
        found = [Path(f) / STATE_FILE for f in folders if isinstance(f, str) and (Path(f) / STATE_FILE).is_file()]
        if not found:
            raise ValueError(
                f"training resumes at step {state.global_step}, but no {STATE_FILE} lies in "
                f"{[f for f in folders if f]}; pass TopoPruneCallback(..., resume_from=<checkpoint folder>)"
            )
        return found[0]

    def _remember(self, event: SolveEvent) -> None:
        self._news = event

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a log after a decision; write the state where a checkpoint is about to be."""
        if self._news is not None:
            control.should_log = True
        if control.should_save:
            self._save(args, state)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state where a checkpoint is about to be."""
        if control.should_save:
            self._save(args, state)

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the state first of all: the Trainer's own file comes last and makes the checkpoint complete.

        Otherwise a kill between the two would leave a checkpoint that cannot be resumed, with the one before it
        deleted already (``save_total_limit=1``).
        """
        if self.pruner is None or self._saved == state.global_step:
            return
        told = self.pruner.state_dict()  # on all ranks
        self._saved = state.global_step
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_state(told, folder / STATE_FILE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add sparsity to every log, and what was decided to the log after a decision."""
        if self.pruner is None or logs is None or self.pruner.handle.closed:
            return
        figures = self.pruner.sparsity()
        extra: dict[str, Any] = {
            "topoprune/zeros": round(figures.zeros, 6),
            "topoprune/removable": round(figures.removable, 6),
            "topoprune/heads": sum(kept for name, (kept, _) in figures.kept.items() if name.endswith("attention")),
        }
        parts = self.pruner.distilled
        extra |= {f"topoprune/{name}_loss": round(float(part), 6) for name, part in parts.items()}
        if self._news is not None:
            event, self._news = self._news, None
            extra["topoprune/gap"] = event.gap
            extra |= {f"topoprune/{part}_seconds": round(value, 6) for part, value in event.seconds.items()}
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the pruner's state into the checkpoint just made, if it was not known before that it would be."""
        self._save(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Release the model; the zeros stay in the weights."""
        if self.pruner is not None:
            self.pruner.close()


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Return optimizer steps per pass over the data; a stream without length is one epoch."""
    try:
        batches = len(dataloader)
    except TypeError:
        return max(1, state.max_steps)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))
