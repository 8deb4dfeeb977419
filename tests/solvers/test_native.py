"""Laws of solvers in processes of their own: nothing that goes wrong there is lost, hangs or spreads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from topoprune_solvers.native import NativeOutcome, NativeTask, physical_memory, race, run_killable
from topoprune_solvers.result import Deadline, interruptible

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and memory limits are POSIX")


def run(name: str, *arguments: object, seconds: float = 30.0) -> tuple[NativeOutcome, list[object]]:
    """Run a function of native_tasks.py and collect its messages."""
    messages: list[object] = []
    outcome = run_killable(
        f"native_tasks:{name}", arguments, deadline=Deadline.after(seconds), on_message=messages.append
    )
    return outcome, messages


def test_values_and_messages_come_back() -> None:
    array = np.arange(300_000)  # more than a pipe holds
    outcome, messages = run("double", array)
    assert outcome.state == "finished" and outcome.message == ""
    assert np.array_equal(outcome.value, 2 * array) and messages == ["working"]


def test_a_process_is_killed_at_the_limit_and_its_messages_are_kept() -> None:
    started = time.perf_counter()
    outcome, messages = run("count_for_ever", seconds=2.0)
    assert outcome.state == "killed" and "time limit" in outcome.message
    assert messages == list(range(len(messages)))
    assert time.perf_counter() - started < 2.0 * 1.1 + 1.5


def test_a_message_can_end_the_run() -> None:
    outcome = run_killable("native_tasks:count_for_ever", on_message=lambda number: number == 5)
    assert outcome.state == "killed" and "over" in outcome.message


@POSIX
@pytest.mark.parametrize(
    ("name", "said", "messages"),
    [
        ("segfault", "SIGSEGV", ["incumbent"]),
        ("killed", "SIGKILL", ["incumbent"]),
        ("leave", "exit code 3 and no result: not enough of something", []),
        ("fail", "RuntimeError: no such thing", []),
        ("fill_memory", "out of memory", []),
        ("write_garbage", "connection", []),
        ("missing", "AttributeError", []),
    ],
)
def test_a_crash_is_an_outcome(name: str, said: str, messages: list[object]) -> None:
    outcome, received = run(name)
    assert outcome.state == "crashed" and outcome.value is None
    assert said in outcome.message
    assert received == messages


@POSIX
def test_the_whole_group_is_killed() -> None:
    children: list[int] = []
    outcome = run_killable("native_tasks:sleep_with_child", on_message=lambda pid: not children.append(pid))
    assert outcome.state == "killed"
    (child,) = children
    until = time.perf_counter() + 5
    while time.perf_counter() < until and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(status.stdout.strip()) and not status.stdout.strip().startswith("Z")


def test_printing_does_not_disturb_the_messages() -> None:
    outcome, _ = run("print_garbage")
    assert outcome.state == "finished" and outcome.value == "done"


def test_the_child_knows_the_limit() -> None:
    assert 0 < run("remaining", seconds=20.0)[0].value < 20.0
    assert run_killable("native_tasks:remaining").value == float("inf")


@POSIX
def test_a_memory_bound_is_the_callers() -> None:
    # A terabyte of address space may be granted until it is written to: the bound forbids it before.
    bound = min(physical_memory(), 2 << 30)
    assert "out of memory (limit" in run_killable("native_tasks:fill_memory", memory_bytes=bound).message


def test_races_run_side_by_side_and_start_the_next_in_line() -> None:
    tasks = [NativeTask("native_tasks:double", (number,), f"task {number}") for number in range(4)]
    ended: list[str] = []
    outcomes = race(tasks, parallel=2, on_end=lambda task, _: ended.append(task.label))
    assert [outcome.value for outcome in outcomes] == [0, 2, 4, 6]
    assert sorted(ended) == [task.label for task in tasks]


def test_a_race_ends_with_its_first_answer() -> None:
    tasks = [NativeTask("native_tasks:sleep_after", ("mine",)), NativeTask("native_tasks:double", (1,))]
    started = time.perf_counter()
    outcomes = race([*tasks, tasks[1]], on_end=lambda task, outcome: outcome.state == "finished")
    assert time.perf_counter() - started < 30
    assert [outcome.state for outcome in outcomes] == ["killed", "finished", "killed"]
    assert outcomes[2].message == "not started"


def test_a_task_has_a_limit_of_its_own_and_the_next_one_starts() -> None:
    tasks = [NativeTask("native_tasks:count_for_ever", seconds=1.0), NativeTask("native_tasks:double", (1,))]
    outcomes = race(tasks, parallel=1)
    assert [outcome.state for outcome in outcomes] == ["killed", "finished"]
    assert "own limit" in outcomes[0].message


def test_arguments_can_be_made_when_a_task_starts() -> None:
    seen: list[int] = []
    tasks = [
        NativeTask("native_tasks:double", (3,)),
        NativeTask("native_tasks:double", lambda: (seen[0],)),
    ]
    outcomes = race(tasks, parallel=1, on_end=lambda task, outcome: seen.append(outcome.value))
    assert outcomes[1].value == 12


def test_a_passed_deadline_starts_nothing() -> None:
    outcome = run_killable("native_tasks:double", (1,), deadline=Deadline.after(0.0))
    assert outcome.state == "killed" and outcome.message == "not started"


@POSIX
def test_ctrl_c_stops_a_run_and_keeps_its_messages() -> None:
    messages: list[int] = []

    def press(number: int) -> None:
        messages.append(number)
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)

    with interruptible():
        outcome = run_killable("native_tasks:count_for_ever", on_message=press)
    assert outcome.state == "killed" and messages[0] == 0


@POSIX
def test_keyboard_interrupt_leaves_no_process() -> None:
    pids: list[int] = []

    def interrupt(pid: int) -> None:
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_killable("native_tasks:sleep_with_child", on_message=interrupt)
    until = time.perf_counter() + 5
    while time.perf_counter() < until and _alive(pids[0]):
        time.sleep(0.05)
    assert not _alive(pids[0])


@POSIX
def test_no_orphan_outlives_a_killed_parent(tmp_path: object) -> None:
    # A script without a main guard, run from a folder whose files carry names of the standard library.
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.append({os.path.dirname(__file__)!r})
        from topoprune_solvers.native import run_killable
        run_killable("native_tasks:sleep_with_child", on_message=lambda pid: print(pid, flush=True))
        """
    )
    folder = str(tmp_path)
    for name in ("script.py", "queue.py", "numpy.py"):
        with open(os.path.join(folder, name), "w") as file:
            file.write(script if name == "script.py" else "raise ImportError('the wrong module')")
    # -P keeps the folder out of the parent's own search path, where it would break the parent already.
    command = [sys.executable, "-c", f"import sys; sys.path.pop(0); exec(open({folder + '/script.py'!r}).read())"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder, text=True)
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    child = int(subprocess.run(["ps", "-o", "ppid=", "-p", str(grandchild)], capture_output=True, text=True).stdout)
    assert _alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.perf_counter() + 5
    while time.perf_counter() < until and _alive(child):
        time.sleep(0.05)
    alive = _alive(child)
    os.kill(grandchild, signal.SIGKILL)
    assert not alive


@pytest.mark.parametrize("in_thread", [False, True])
def test_runs_from_any_thread(in_thread: bool) -> None:
    values: list[object] = []
    call: Callable[[], None] = lambda: values.append(run("double", 21)[0].value)  # noqa: E731
    if in_thread:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert values == [42]
