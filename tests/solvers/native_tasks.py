"""Functions for test_native.py to run in processes of their own; most of them misbehave."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

from topoprune_solvers.native import Channel


def double(channel: Channel, value: Any) -> Any:
    channel.send("working")
    return value + value


def count_for_ever(channel: Channel) -> None:
    number = 0
    while True:
        channel.send(number)
        number += 1
        time.sleep(0.01)


def sleep_after(channel: Channel, message: Any) -> None:
    channel.send(message)
    time.sleep(60)


def sleep_with_child(channel: Channel) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    channel.send(child.pid)
    time.sleep(60)


def segfault(channel: Channel) -> None:
    channel.send("incumbent")
    ctypes.string_at(0)


def killed(channel: Channel) -> None:
    channel.send("incumbent")
    os.kill(os.getpid(), signal.SIGKILL)


def leave(channel: Channel) -> None:
    print("not enough of something", file=sys.stderr, flush=True)
    os._exit(3)


def fail(channel: Channel) -> None:
    raise RuntimeError("no such thing")


def fill_memory(channel: Channel) -> int:
    return len(bytearray(1 << 40))


def print_garbage(channel: Channel) -> str:
    os.write(1, b"\x80\x04garbage from native code" * 10_000)
    print("more of it")
    return "done"


def write_garbage(channel: Channel) -> None:
    channel._stream.write(b"\x00\x01 not a pickle")
    channel._stream.flush()
    time.sleep(60)


def remaining(channel: Channel) -> float:
    return channel.remaining()


def folder(channel: Channel) -> tuple[str, bool]:
    return os.getcwd(), "" in sys.path
