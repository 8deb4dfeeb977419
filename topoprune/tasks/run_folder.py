"""The folder of a run: may it be written, what does it hold, can it be resumed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topoprune.tasks.results import json_ready, write_json

__all__ = ["RunFolder", "writable_folder"]

_RUN_FILE = "run.json"


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder if need be and prove by writing that it can be written; return it.

    Raises:
        OSError: a file is in the way, or no right to write; names the path.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = "a file is in the way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise OSError(
            f"cannot write to the output folder {folder}: {what}; choose another with --output-dir"
        ) from error
    return folder


@dataclass(frozen=True)
class RunFolder:
    """An output folder that is ready for a run.

    Args:
        path: the folder.
        settings: what must be equal on resume.
        checkpoint: newest Trainer checkpoint to resume from, or None.
        seconds_before: training time of the sessions before this one.
    """

    path: Path
    settings: Mapping[str, Any]
    checkpoint: str | None = None
    seconds_before: float = 0.0

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], settings: Mapping[str, Any], *, resume: bool, overwrite: bool = False
    ) -> RunFolder:
        """Check and prepare a folder.

        Raises:
            OSError: it cannot be written.
            ValueError: nothing to resume, resumed settings differ, or a new run would mix with an
                interrupted one.
        """
        from topoprune.train.callback import STATE_FILE
        from topoprune.train.checkpoint import newest_checkpoint

        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        folder = writable_folder(path)
        if overwrite:
            cls(folder, settings).finish()
        # Without the pruner's state a pruned run could not go on; but a checkpoint of any run stops a new one.
        holds = (STATE_FILE,) if resume and settings.get("recipe") is not None else ()
        newest = newest_checkpoint(folder, holds=holds)
        settings = json_ready(settings)
        if not resume:
            if newest is not None:
                raise ValueError(
                    f"{folder} holds {newest.name} of an interrupted run; add --resume to go on, "
                    "--overwrite to start anew, or choose another --output-dir"
                )
            for stale in ("result.json", "plan.npz"):  # of an earlier run: they would belie this one
                (folder / stale).unlink(missing_ok=True)
            write_json(folder / _RUN_FILE, {"settings": settings, "seconds": 0.0})
            return cls(folder, settings)
        if newest is None:
            done = " (the run there is complete)" if (folder / "result.json").is_file() else ""
            raise ValueError(f"nothing to resume: no checkpoint in {folder}{done}; start without --resume")
        before = _read_run(folder)
        differing = _differences(before["settings"], settings)
        if differing:
            name, was, now = differing[0]
            raise ValueError(
                f"cannot resume {newest}: {name} was {was!r}, now it is {now!r}; resume with the settings "
                "of the interrupted run"
            )
        return cls(folder, settings, str(newest), float(before.get("seconds", 0.0)))

    def record_stop(self, step: int, seconds: float) -> Path:
        """Note the time spent so far; return the checkpoint of the step."""
        write_json(self.path / _RUN_FILE, {"settings": self.settings, "seconds": seconds})
        return self.path / f"checkpoint-{step}"

    def finish(self) -> None:
        """Delete the checkpoints of a run that is complete: the model itself has been saved."""
        for checkpoint in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads((folder / _RUN_FILE).read_text(encoding="utf-8"))
        data["settings"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot resume: {folder / _RUN_FILE} is missing or damaged ({error})") from error
    return data


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for name in sorted(set(was) | set(now)):
        before, after = was.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((f"{prefix}{name}", before, after))
    return found
