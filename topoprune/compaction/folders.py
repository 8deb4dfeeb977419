"""Folders that are replaced as a whole: a kill at any moment leaves the old one or the new one.

A save writes into a hidden folder beside its target, ``.NAME.new-*``, and swaps the two in one system call
(``renameat2`` with ``RENAME_EXCHANGE`` on Linux). Where there is none, the target is moved to ``.NAME.old-*``
and the new folder into its place; a kill in between is mended by `existing_folder` and by the next save.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_folder", "check_target", "existing_folder", "flushing"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(path: str | os.PathLike[str], *marks: str) -> Path:
    """Return the folder a save to `path` replaces (links followed), which need not exist.

    Args:
        path: where to save.
        marks: names of files; an existing folder with something in it must hold one of them.

    Raises:
        NotADirectoryError: the path, or something above it, is a file.
        ValueError: a folder that holds something else than what is replaced here, or in which this process stands.
    """
    if not os.fspath(path):
        raise ValueError("the path to save to is empty")
    target = Path(os.path.realpath(path))
    if target.parent == target:
        raise ValueError(f"cannot save to {target}: give a folder of its own for the model")
    here = Path(os.path.realpath(os.curdir))
    if target == here or target in here.parents:
        raise ValueError(f"cannot save to {target}: it is replaced as a whole, and this process stands in it")
    above = next(folder for folder in (target, *target.parents) if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"cannot save to {path}: {above} is a file; give the name of a folder")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).is_file() for mark in marks):
        raise ValueError(
            f"{path} is not empty and holds no model ({' or '.join(marks)} is missing); nothing was written. "
            "Save to an empty or new folder, or to one with an earlier model"
        )
    return target


@contextmanager
def atomic_folder(target: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder; swap it with `target` if the block succeeds, else remove it.

    Entries of the old folder that the block did not write move along (hard links), unless they are stale.
    Remains of saves that were killed are removed first.

    Args:
        target: from `check_target`. Folders above it are made.
        stale: whether an entry of the old folder, by its name, goes with it.

    Raises:
        OSError: no permission, no space, a folder that cannot be swapped; the old folder is as it was.

    Complexity: what is written goes to the disk (fsync) once; entries that move along are not copied where the
        file system has hard links.
    """
    new, lock = _make_beside(target)
    try:
        _clean(target)
        try:
            yield new
            if target.is_dir():
                _carry(target, new, stale)
            _flush(new)
            _allow(new, target)
            old = _swap(new, target)
        except OSError as error:
            raise _explained(error, target) from error
        if old is not None:
            with contextlib.suppress(OSError):
                _carry(old, target, stale)  # what came into the old folder since
            shutil.rmtree(old, ignore_errors=True)
        _sync(target.parent)
    finally:
        if lock is not None:
            os.close(lock)
        if new.exists():
            shutil.rmtree(new, ignore_errors=True)


def existing_folder(path: Path) -> Path:
    """Return `path`, or what a save that was killed between two renames left of it; `path` if there is nothing.

    Complexity: O(1); a listing of the folder above if `path` is missing.
    """
    if path.exists() or not path.parent.is_dir():
        return path
    left = sorted(path.parent.glob(f".{_escaped(path.name)}.old-*"), key=lambda folder: folder.stat().st_mtime)
    if not left:
        return path
    warnings.warn(
        f"{path} is missing; reading {left[-1]}, what a save that was killed left of it. Rename it to {path.name}",
        stacklevel=4,
    )
    return left[-1]


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _make_beside(target: Path) -> tuple[Path, int | None]:
    """Make a temporary folder beside the target, locked for as long as this process lives."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
            # Between its making and its lock, the folder looks like a dead one's to another save.
            with contextlib.suppress(BlockingIOError):
                lock = _lock(new)
                if new.exists():
                    return new, lock
                if lock is not None:
                    os.close(lock)
    except OSError as error:
        raise _explained(error, target) from error


def _lock(folder: Path) -> int | None:
    """Return a locked file descriptor, None where there are no locks; BlockingIOError if a process holds it."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _clean(target: Path) -> None:
    """Remove what killed saves left; bring the old folder back if one died between two renames."""
    pattern = _escaped(target.name)
    left = sorted(target.parent.glob(f".{pattern}.old-*"), key=lambda folder: folder.stat().st_mtime)
    if left and not target.exists():
        os.rename(left.pop(), target)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in target.parent.glob(f".{pattern}.new-*"):
        with contextlib.suppress(BlockingIOError):  # of a live save, this one's own among them
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _carry(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    for entry in sorted(os.listdir(old)):
        source, goal = old / entry, new / entry
        if os.path.lexists(goal) or stale(entry):
            continue
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, goal, symlinks=True, copy_function=_link)
        else:
            _link(source, goal)


def _link(source: str | os.PathLike[str], goal: str | os.PathLike[str]) -> None:
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, goal, follow_symlinks=False)


@contextmanager
def flushing(folder: Path) -> Iterator[None]:
    """Send the files that a folder has now to the disk while the block runs: that is waiting, not computing."""
    files = [entry for entry in folder.iterdir() if entry.is_file()]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_sync, file) for file in files]
        yield
        for job in jobs:
            job.result()


def _flush(folder: Path) -> None:
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    own = [file for file in files if not file.is_symlink() and file.stat().st_nlink == 1]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_sync, [*own, folder]))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _allow(new: Path, target: Path) -> None:
    """Give the folder, which mkdtemp makes private, the rights of the old one or ordinary rights."""
    umask = os.umask(0)
    os.umask(umask)
    new.chmod(target.stat().st_mode & 0o7777 if target.is_dir() else 0o777 & ~umask)


def _swap(new: Path, target: Path) -> Path | None:
    """Put `new` in the target's place; return where the old folder is now, None if there was none."""
    if not target.exists():
        os.rename(new, target)
        return None
    if _exchange(new, target):
        return new
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(other))


def _explained(error: OSError, target: Path) -> OSError:
    """Return the error with what to do; its type and number stay."""
    advice = {
        errno.EACCES: f"no permission to write to {target.parent}, beside which the new folder is made",
        errno.EPERM: f"no permission to write to {target.parent}, beside which the new folder is made",
        errno.EROFS: f"{target.parent} cannot be written",
        errno.ENOSPC: f"no space left in {target.parent}, which for a moment holds the old and the new folder",
        errno.EDQUOT: f"the quota of {target.parent} is used up",
        errno.EBUSY: f"{target} is a mount point and cannot be swapped; save to a folder below it",
    }.get(error.errno or 0)
    if advice is None:
        return error
    return type(error)(error.errno, f"cannot save to {target}: {advice}; nothing was changed")
