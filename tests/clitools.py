"""A command in a process of its own, stopped by Ctrl-C at a moment that it announces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

__all__ = ["interrupted"]


def interrupted(code: str, moment: str, *words: object, signals: int = 1) -> tuple[int, str, str]:
    """Run code with these arguments, send SIGINT once stderr says `moment`; return exit code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # A shell's background jobs ignore SIGINT, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    killer = threading.Timer(100, process.kill)  # a process that does not stop fails the test, and ends
    killer.start()
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if moment in line:
                break
        process.send_signal(signal.SIGINT)
        for _ in range(signals - 1):
            threading.Event().wait(0.5)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        killer.cancel()
    return process.returncode, out, said + err
