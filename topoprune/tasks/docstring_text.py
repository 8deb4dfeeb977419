"""Embedded tasks on whole docstrings of Python's standard library: write the summary line, or model the text.

Both read the same texts as the embedded classification task (`topoprune.tasks.docstrings`), uncut. Whether a
docstring is held out depends on its first line alone, so equal summaries never lie in both splits; of docstrings with
equal words one stays, and of those with equal bodies too.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from topoprune.tasks.cache import cached
from topoprune.tasks.docstrings import in_validation, stdlib_docstrings, text_key
from topoprune.tasks.language_modelling import LanguageModelling
from topoprune.tasks.seq2seq import Generation, TextPair
from topoprune.tasks.summarization import Summarization
from topoprune.tasks.text_metrics import first_sentence

__all__ = ["collect_texts", "load_docstring_summaries", "load_docstring_text", "split_summary"]

_FEWEST_TEXTS = 1000
_FEWEST_WORDS = 4
_MAX_BODY = 2000  # characters: whole manuals are no bodies to sum up in a line
# Part of the cache's name: raise it when what is collected changes.
_VERSION = 1
_ORIGIN = f"of the standard library of Python {sys.version.split()[0]}"


def load_docstring_summaries(
    *,
    prefix: str = "",
    max_target_length: int = 128,
    num_beams: int = 1,
    cache: Path | None = None,
    use_cache: bool = True,
) -> Summarization:
    """Return the embedded summarization task: from the body of a docstring to its first line.

    Only docstrings that have both, with an empty line between them, count.

    Args:
        prefix, max_target_length, num_beams: see `Generation`.
        cache: folder of the cache file; default: the user's. use_cache: False neither reads nor writes it.

    Raises:
        ValueError: this Python has no sources to read, or rouge-score is not installed.
    """
    generation = Generation(prefix, max_target_length, num_beams)
    pairs: dict[str, tuple[str, str]] = {}
    for text in _texts(cache, use_cache):
        split = split_summary(text)
        if split is not None:
            pairs.setdefault(text_key(split[0]), split)
    train, validation = (
        tuple(
            TextPair(body, (summary,), first_sentence(body))
            for body, summary in pairs.values()
            if in_validation(summary) is held_out
        )
        for held_out in (False, True)
    )
    source = f"embedded: {len(pairs):,} docstrings {_ORIGIN}, from their bodies to their first lines"
    return Summarization("stdlib-summaries", source, train, validation, generation)


def load_docstring_text(
    *, block_size: int | None = None, cache: Path | None = None, use_cache: bool = True
) -> LanguageModelling:
    """Return the embedded language-modelling task: the docstrings as they stand.

    Args:
        block_size: see `LanguageModelling`. cache, use_cache: as `load_docstring_summaries`.

    Raises:
        ValueError: this Python has no sources to read.
    """
    texts = _texts(cache, use_cache)
    train, validation = (
        tuple(text for text in texts if in_validation(text.split("\n", 1)[0]) is held_out) for held_out in (False, True)
    )
    source = f"embedded: {len(texts):,} docstrings {_ORIGIN}"
    return LanguageModelling("stdlib-text", source, train, validation, block_size)


def split_summary(docstring: str) -> tuple[str, str] | None:
    """Return (body, first line) of a docstring; None where one is missing, too short, or the body very long.

    Example:
        >>> split_summary("Return the larger one.\\n\\nOf equal ones the first counts.")
        ('Of equal ones the first counts.', 'Return the larger one.')
        >>> split_summary("Return the larger one.") is None
        True
    """
    summary, newline, rest = docstring.strip().partition("\n")
    if not newline or rest.split("\n", 1)[0].strip():
        return None
    body, summary = " ".join(rest.split()), " ".join(summary.split())
    words = [len(text_key(text).split()) for text in (body, summary)]
    return (body, summary) if min(words) >= _FEWEST_WORDS and len(body) <= _MAX_BODY else None


def collect_texts(stdlib: Path) -> list[str]:
    """Read docstrings of at least four words from the sources under a folder, sorted, without repetitions.

    Raises:
        ValueError: fewer than 1000 texts.

    Complexity: parses every source file once; about 4 s.
    """
    found: dict[str, str] = {}
    for _, docstring in stdlib_docstrings(stdlib):
        key = text_key(docstring)
        if len(key.split()) >= _FEWEST_WORDS:
            found.setdefault(key, docstring.strip())
    if len(found) < _FEWEST_TEXTS:
        raise ValueError(
            f"found only {len(found)} docstrings under {stdlib}, expected at least {_FEWEST_TEXTS}: the sources of "
            "Python's standard library are not installed here. Use your own data: --train-file and --validation-file"
        )
    return sorted(found.values())


def _texts(cache: Path | None, use_cache: bool) -> list[str]:
    return cached(
        f"stdlib-text-v{_VERSION}",
        lambda: collect_texts(Path(sysconfig.get_path("stdlib"))),
        _accept,
        folder=cache,
        use_cache=use_cache,
    )


def _accept(value: Any) -> list[str] | None:
    """Return the texts of a cache file, or None if they are not what would be collected."""
    usable = isinstance(value, list) and len(value) >= _FEWEST_TEXTS and all(isinstance(text, str) for text in value)
    return value if usable else None
