"""Run a native solver in a process of its own: it can be killed, run out of memory or crash, and nothing is lost.

Solvers written in C++ overshoot their time limits, abort on a failed assertion or take all memory. `run_killable`
starts a module-level function in a fresh Python process, streams its messages (incumbents and bounds) back while
it runs, kills the whole process group at the limit, and says how it ended. `race` does so for several at once.
The fresh process imports this package only: never the user's ``__main__``, so it works from notebooks, from scripts
without a main guard and under pytest-xdist, and no threads or locks are inherited as they are by a fork.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from topoprune_solvers.result import NEVER, Deadline

__all__ = ["Channel", "NativeOutcome", "NativeTask", "physical_memory", "race", "run_killable", "worker"]

GRACE = 0.1  # seconds past the limit in which a solver that keeps its own limit may deliver its result
_POLL = 0.05  # seconds between looks at the deadline, which a Ctrl-C passes
_TAIL = 4000  # characters kept of what a process prints


@dataclass(frozen=True)
class NativeTask:
    """One function to run.

    Args:
        function: ``"package.module:name"``; it is called as ``name(channel, *arguments)`` with a `Channel`.
        arguments: picklable values, or a function that returns them, called when the process starts (which in a
            race can be long after the first ones).
        name: what messages and outcomes are labelled with; the function by default.
        seconds: a limit of its own, after which it alone is killed.
    """

    function: str
    arguments: tuple[Any, ...] | Callable[[], tuple[Any, ...]] = ()
    name: str = ""
    seconds: float = math.inf

    @property
    def label(self) -> str:
        """The name, or else the function."""
        return self.name or self.function


@dataclass(frozen=True)
class NativeOutcome:
    """How a process ended.

    Args:
        state: ``"finished"``, ``"killed"`` (at the limit, or because the race was over) or ``"crashed"``.
        value: what the function returned, None unless finished.
        message: why it crashed or was killed: exception, signal or exit code with the last line it printed.
        seconds: wall-clock time it ran, start-up included.
    """

    state: Literal["finished", "killed", "crashed"]
    value: Any = None
    message: str = ""
    seconds: float = 0.0


class Channel:
    """The child's side of the connection: what a task sees of the process that started it."""

    def __init__(self, stream: Any, until: float, seconds: float) -> None:
        self._stream, self._lock = stream, threading.Lock()
        # The wall clock is the one both processes share; the other term guards against its jumps.
        self._until, self._latest = until, time.perf_counter() + seconds

    def send(self, message: Any) -> None:
        """Stream a message to the parent; callable from any thread."""
        data = pickle.dumps(("message", message), pickle.HIGHEST_PROTOCOL)
        self._write(data)

    def remaining(self) -> float:
        """Return the seconds left until the parent's limit, >= 0; inf without one."""
        return max(0.0, min(self._until - time.time(), self._latest - time.perf_counter()))

    def _write(self, data: bytes) -> None:
        with self._lock:
            self._stream.write(data)
            self._stream.flush()

    def finish(self, kind: str, value: Any) -> None:
        """Send the result or the error, the last words of the process."""
        self._write(pickle.dumps((kind, value), pickle.HIGHEST_PROTOCOL))


def run_killable(
    function: str,
    arguments: Sequence[Any] = (),
    *,
    deadline: Deadline = NEVER,
    memory_bytes: int | None = None,
    on_message: Callable[[Any], bool | None] | None = None,
) -> NativeOutcome:
    """Run one function in a process of its own.

    Args:
        function: ``"package.module:name"``, called as ``name(channel, *arguments)``. arguments: picklable values.
        deadline: when the process is killed, `GRACE` seconds late; a Ctrl-C inside `interruptible` passes it.
        memory_bytes: bound on the process' address space (POSIX), half the physical memory by default.
        on_message: called here with what the function sends; True stops the process.

    Example:
        >>> run_killable("operator:index", ()).state  # it takes no channel: an error there is an outcome here
        'crashed'
    """
    task = NativeTask(function, tuple(arguments))
    receive = None if on_message is None else lambda _, message: on_message(message)
    return race([task], deadline=deadline, memory_bytes=memory_bytes, on_message=receive)[0]


def race(
    tasks: Sequence[NativeTask],
    *,
    deadline: Deadline = NEVER,
    parallel: int = 2,
    memory_bytes: int | None = None,
    on_message: Callable[[NativeTask, Any], bool | None] | None = None,
    on_end: Callable[[NativeTask, NativeOutcome], bool | None] | None = None,
) -> list[NativeOutcome]:
    """Run several functions, at most `parallel` at a time and in the given order, until all end or one wins.

    Args:
        tasks, deadline, memory_bytes: as for `run_killable`.
        on_message: called here with each message in the order of arrival; True ends the race.
        on_end: called here when a process has ended; True ends the race.

    Returns:
        One outcome a task. Those running when the race ends, or never started, are ``"killed"``.
    """
    inbox: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
    outcomes = [NativeOutcome("killed", message="not started") for _ in tasks]
    running: dict[int, _Process] = {}
    retired: dict[int, _Process] = {}  # killed, but what they sent before may still be on its way
    started, over = 0, False

    def handle(number: int, kind: str, value: Any) -> bool:
        if kind == "message":
            return bool(on_message is not None and on_message(tasks[number], value))
        if number in retired:
            return False
        outcomes[number] = running.pop(number).outcome(kind, value)
        return bool(on_end is not None and on_end(tasks[number], outcomes[number]))

    try:
        while not over and (running or started < len(tasks)):
            while started < len(tasks) and len(running) < parallel and not deadline.passed():
                running[started] = _Process(started, tasks[started], deadline, memory_bytes, inbox)
                started += 1
            if deadline.passed() and (not running or time.perf_counter() >= deadline.at + GRACE or _asked(deadline)):
                break
            for number in [number for number, process in running.items() if process.overdue()]:
                running[number].kill()
                outcomes[number] = NativeOutcome("killed", None, "killed at its own limit", running[number].seconds())
                retired[number] = running.pop(number)
            with contextlib.suppress(queue.Empty):
                over = handle(*inbox.get(timeout=_POLL))
    finally:
        for process in running.values():
            process.kill()
    # What was sent before the kill still counts; the reading threads end with their pipes.
    until = time.perf_counter() + GRACE
    stopped = "stopped: the race is over" if over else "killed at the time limit"
    while running and time.perf_counter() < until:
        with contextlib.suppress(queue.Empty):
            number, kind, value = inbox.get(timeout=_POLL)
            if kind in ("message", "result"):
                handle(number, kind, value)
            else:
                outcomes[number] = NativeOutcome("killed", None, stopped, running.pop(number).seconds())
    for number, process in running.items():
        outcomes[number] = NativeOutcome("killed", None, stopped, process.seconds())
    return outcomes


def _asked(deadline: Deadline) -> bool:
    """Return True if the deadline has passed before its time: a Ctrl-C, for which nobody waits."""
    return deadline.passed() and time.perf_counter() < deadline.at


def physical_memory() -> int:
    """Return the bytes of memory of this machine; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


class _Process:
    """The parent's side: a process, a thread that reads its messages and one that reads what it prints."""

    def __init__(
        self,
        number: int,
        task: NativeTask,
        deadline: Deadline,
        memory_bytes: int | None,
        inbox: queue.SimpleQueue[tuple[int, str, Any]],
    ) -> None:
        self._number, self._inbox = number, inbox
        self._started = time.perf_counter()
        seconds = min(deadline.remaining(), task.seconds)
        self._limit = task.seconds
        limit = physical_memory() // 2 if memory_bytes is None else memory_bytes
        arguments = task.arguments() if callable(task.arguments) else task.arguments
        request = (task.function, arguments, time.time() + seconds, seconds, limit)
        data = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        # The same search path as here, and no current folder in front of it whose files could shadow modules.
        boot = f"import sys; sys.path[:] = {sys.path!r}; from topoprune_solvers.native import worker; worker()"
        # A numerical library that starts threads of its own would race the other process.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._words = b""
        self._popen: subprocess.Popen[bytes] | None = None
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=environment,
                start_new_session=os.name == "posix",
            )
        except OSError as error:
            inbox.put((number, "error", f"cannot start a process: {error}"))
            return
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        threading.Thread(target=self._exchange, args=(data,), daemon=True).start()

    def _exchange(self, data: bytes) -> None:
        assert self._popen is not None and self._popen.stdin is not None and self._popen.stdout is not None
        last: tuple[str, Any] = ("end", None)
        # A process that dies early breaks the pipe; its end is then what there is to tell.
        with contextlib.suppress(OSError, ValueError):
            self._popen.stdin.write(data)
            self._popen.stdin.flush()  # and left open: its end tells the child that this process is gone
        try:
            while last[0] in ("message", "end"):
                last = pickle.load(self._popen.stdout)
                if last[0] == "message":
                    self._inbox.put((self._number, *last))
        except Exception:  # EOF, or half a message of a killed process
            last = ("end", None)
        self._popen.stdout.close()
        self._inbox.put((self._number, *last))

    def _listen(self) -> None:
        assert self._popen is not None and self._popen.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._popen.stderr.fileno(), 65536):
                self._words = (self._words + chunk)[-_TAIL:]
            self._popen.stderr.close()

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._started

    def overdue(self) -> bool:
        """Return True past the task's own limit."""
        return self.seconds() > self._limit + GRACE

    def outcome(self, kind: str, value: Any) -> NativeOutcome:
        """Reap the process after its last message and return how it ended."""
        if self._popen is None:
            return NativeOutcome("crashed", None, str(value), self.seconds())
        if kind == "end":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(GRACE)
        code = self._popen.poll()
        self.kill()
        if kind == "result":
            return NativeOutcome("finished", value, "", self.seconds())
        if kind == "error":
            return NativeOutcome("crashed", None, str(value), self.seconds())
        return NativeOutcome("crashed", None, _epitaph(code, self._words), self.seconds())

    def kill(self) -> None:
        """End the process and whatever it started, and reap it."""
        if self._popen is None:
            return
        try:
            if os.name == "posix":
                os.killpg(self._popen.pid, signal.SIGKILL)
            else:
                self._popen.kill()
        except (ProcessLookupError, PermissionError):
            pass
        self._popen.wait()
        self._listener.join(GRACE)
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()


def _epitaph(code: int | None, words: bytes) -> str:
    if code is not None and code < 0:
        try:
            ending = f"ended by {signal.Signals(-code).name}"
        except ValueError:
            ending = f"ended by signal {-code}"
    else:
        ending = "closed its connection" if code is None else f"ended with exit code {code} and no result"
    lines = [line.strip() for line in words.decode(errors="replace").splitlines() if line.strip()]
    return f"{ending}: {lines[-1][:300]}" if lines else ending


def worker() -> None:
    """Serve one task: the whole life of the started process."""
    request = pickle.load(sys.stdin.buffer)
    function, arguments, until, seconds, memory_bytes = request
    # Messages keep the pipe for themselves: what native code prints goes where errors go.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    channel = Channel(stream, until, seconds)
    code = 0
    try:
        _bound_memory(memory_bytes)
        _end_with_parent()
        module, name = function.split(":")
        channel.finish("result", getattr(import_module(module), name)(channel, *arguments))
    except MemoryError:
        del arguments, request
        channel.finish("error", f"out of memory (limit {memory_bytes / 2**30:.1f} GiB)")
    except BaseException as error:
        channel.finish("error", f"{type(error).__name__}: {error}")
        code = 1
    # No clean-up: destructors of large models take seconds, and the system frees everything anyway.
    os._exit(code)


def _bound_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # not POSIX
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _end_with_parent() -> None:
    """Leave no orphan: the kernel's word on Linux, elsewhere (and besides) a thread that waits for stdin to close."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform.startswith("linux"):
        import ctypes

        parent_death_signal = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
