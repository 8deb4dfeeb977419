"""The embedded task: tell from a docstring of Python's standard library which topic it is about.

About 7,000 real English texts that are on every machine with Python: the docstrings of modules,
classes and functions, read with `ast` (nothing is imported). The label is the topic group of the
top-level module, fixed in `GROUPS`. A text's split depends on the text alone, so it is the same
on every run and every Python version, and equal texts never lie in both splits.

What makes it honest: the name of a text's own module is cut out of it (else "tkinter" gives the
answer away), texts that occur under two groups are dropped, of several equal ones one stays. What remains
is a mixture of easy texts (other module names, protocol names) and hard ones ("Return a copy.").
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topoprune.tasks.cache import cached
from topoprune.tasks.data import ClassificationData, Example

__all__ = [
    "GROUPS",
    "collect_docstrings",
    "in_validation",
    "load_docstrings",
    "stdlib_docstrings",
    "text_key",
]

# Topic group -> top-level modules. The order gives the class index; modules not named are left out.
_MODULES = {
    "network": (
        "asynchat asyncore cgi cgitb email ftplib http imaplib ipaddress mailbox mailcap mimetypes netrc nntplib "
        "poplib smtpd smtplib socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc"
    ),
    "interface": "cmd colorsys curses idlelib rlcompleter tkinter turtle turtledemo",
    "concurrency": (
        "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess "
        "threading"
    ),
    "data": (
        "_markupbase base64 binascii codecs configparser copy copyreg csv dbm difflib encodings gettext html json "
        "locale pickle pickletools plistlib pprint quopri re reprlib shelve shlex sqlite3 sre_compile sre_parse "
        "string stringprep struct textwrap tomllib unicodedata uu xdrlib xml"
    ),
    "files": (
        "_compression _pyio bz2 filecmp fileinput fnmatch genericpath getpass glob gzip io linecache lzma ntpath "
        "nturl2path os pathlib pipes platform posixpath pty shutil stat tarfile tempfile tty zipfile"
    ),
    "numbers": (
        "_collections_abc _pydatetime _pydecimal _strptime bisect calendar collections datetime decimal fractions "
        "graphlib hashlib heapq hmac math numbers operator random secrets statistics uuid zoneinfo"
    ),
    "language": (
        "_py_abc abc ast code codeop contextlib ctypes dataclasses dis enum functools imp importlib inspect keyword "
        "modulefinder opcode pkgutil py_compile pyclbr runpy symtable tabnanny token tokenize types typing warnings "
        "weakref zipimport"
    ),
    "tools": (
        "argparse bdb cProfile compileall distutils doctest ensurepip getopt logging optparse pdb profile pstats "
        "pydoc site sysconfig timeit trace traceback tracemalloc unittest venv zipapp"
    ),
}
GROUPS: dict[str, tuple[str, ...]] = {group: tuple(names.split()) for group, names in _MODULES.items()}
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "_vendor"}
_MIN_CHARACTERS, _MIN_WORDS, _MAX_CHARACTERS = 24, 4, 600
_FEWEST_TEXTS = 1000
_VALIDATION_SHARE = 0.15
# Part of the cache key: raise it when anything above changes what is collected.
_VERSION = 1


def load_docstrings(*, cache: Path | None = None, use_cache: bool = True) -> ClassificationData:
    """Return the embedded task, from the cache or read afresh (a few seconds).

    Args:
        cache: folder of the cache file; default that of `topoprune.tasks.cache`.
        use_cache: False neither reads nor writes it.

    Raises:
        ValueError: this Python has no sources to read (e.g. it runs from a zip file).
    """
    rows = cached(
        f"stdlib-docs-v{_VERSION}",
        lambda: collect_docstrings(Path(sysconfig.get_path("stdlib"))),
        _accept,
        folder=cache,
        use_cache=use_cache,
    )
    names = list(GROUPS)
    examples = [Example(text, names.index(group)) for group, text in rows]
    train = tuple(e for e in examples if not in_validation(e.text))
    validation = tuple(e for e in examples if in_validation(e.text))
    source = (
        f"embedded: {len(rows):,} docstrings of the standard library of Python {sys.version.split()[0]}, "
        f"labelled by the topic of their module ({', '.join(names)})"
    )
    return ClassificationData("stdlib-docs", tuple(names), train, validation, source)


def in_validation(text: str) -> bool:
    """Return whether a text is held out; depends on its words alone, case and punctuation aside.

    >>> in_validation("Return a list of names.") == in_validation("return a  list of names")
    True
    """
    digest = hashlib.sha256(text_key(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < _VALIDATION_SHARE * 2**64


def text_key(text: str) -> str:
    """Return the words of a text, lower case: texts with the same key count as equal."""
    return " ".join(re.findall(r"\w+", text.lower()))


def collect_docstrings(stdlib: Path) -> list[tuple[str, str]]:
    """Read (group, text) pairs from the sources under a folder, sorted, without repetitions.

    Raises:
        ValueError: fewer than 1000 texts.

    Complexity: parses every source file once; about 4 s.
    """
    group_of = {module: group for group, modules in GROUPS.items() for module in modules}
    found: dict[str, dict[str, str]] = {}  # key -> group -> text
    for module, docstring in stdlib_docstrings(stdlib):
        text = _clean(docstring, module)
        if text is not None:
            found.setdefault(text_key(text), {}).setdefault(group_of[module], text)
    # A text with two groups has no right answer.
    rows = [next(iter(groups.items())) for groups in found.values() if len(groups) == 1]
    if len(rows) < _FEWEST_TEXTS:
        raise ValueError(
            f"found only {len(rows)} docstrings under {stdlib}, expected at least {_FEWEST_TEXTS}: the sources of "
            "Python's standard library are not installed here. Use your own data: --train-file and --validation-file"
        )
    return sorted(rows)


def stdlib_docstrings(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield (top-level module, docstring) from the sources of the modules in `GROUPS`, files in sorted order."""
    modules = {module for group in GROUPS.values() for module in group}
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        module = parts[0].removesuffix(".py")
        if module not in modules or _SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith("test_"):
            continue
        for docstring in _docstrings(path):
            yield module, docstring


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and files of other versions are not Python sources
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _clean(docstring: str, module: str) -> str | None:
    """Return one line of text without the module's own name, or None if too little is left."""
    text = re.sub(rf"\b{re.escape(module)}\b", " ", docstring, flags=re.IGNORECASE)
    text = " ".join(text.split())[:_MAX_CHARACTERS]
    enough = len(text) >= _MIN_CHARACTERS and len(text_key(text).split()) >= _MIN_WORDS
    return text if enough else None


def _accept(value: Any) -> list[tuple[str, str]] | None:
    """Return the rows of a cache file, or None if they are not what would be collected."""
    rows = [(str(group), str(text)) for group, text in value]
    return rows if len(rows) >= _FEWEST_TEXTS and {group for group, _ in rows} <= set(GROUPS) else None
