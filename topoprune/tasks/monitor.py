"""What a person sees and can do while a run trains: a progress bar, decisions as they fall, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Monitor", "StopAtStep", "quiet_libraries"]


class StopAtStep(TrainerCallback):
    """First Ctrl-C: finish the step, save a checkpoint, stop. Second: stop at once.

    Use `watching()` around ``trainer.train()``.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.requested = False
        self._console = console

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take over SIGINT; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one aborts
            if self._console is not None:
                self._console.print("[yellow]Ctrl-C: finishing this step and saving a checkpoint (again: abort)[/]")

        signal.signal(signal.SIGINT, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the Trainer to save and stop, once Ctrl-C was pressed and steps are left."""
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control


class Monitor(TrainerCallback):
    """A `rich` progress bar in place of the Trainer's own, with a line for every pruning decision."""

    def __init__(self, title: str, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._title, self._console = title, console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # in a log file only the decisions make sense
        )
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar, at the step a resumed run is at."""
        self._task = self._progress.add_task(
            self._title, total=state.max_steps, completed=state.global_step, note="starting"
        )
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss beside the bar; print what was decided."""
        logs = logs or {}
        if self._task is not None and "loss" in logs:
            self._progress.update(self._task, note=f"loss {float(logs['loss']):.3f}")
        if "topoprune/gap" in logs:
            gap, seconds = float(logs["topoprune/gap"]), float(logs.get("topoprune/solve_seconds", 0.0))
            self._progress.console.print(
                f"  step {state.global_step:>4}: {logs['topoprune/heads']} heads stay, "
                f"zeros {logs['topoprune/zeros']:.1%}, "
                f"removable {logs['topoprune/removable']:.1%}, gap {'-' if gap != gap else f'{gap:.1%}'}, "
                f"solved in {1e3 * seconds:.0f} ms",
                highlight=False,
            )

    def close(self) -> None:
        """Take the bar away; safe to call twice."""
        self._progress.stop()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' and datasets' bars and advice for a while; errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
