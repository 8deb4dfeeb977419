"""Tables, classification data and the embedded task: what they hold and what they refuse."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.datafiles import jsonl, load, save_rows, write
from tests.tinytask import write_task
from topoprune.tasks import ClassificationData, load_docstrings, load_hub_task
from topoprune.tasks import docstrings as docstrings_module
from topoprune.tasks.cache import cache_folder
from topoprune.tasks.docstrings import GROUPS, in_validation
from topoprune.tasks.tables import read_table

Rows = list[dict[str, object]]
ROWS: Rows = [{"text": "one, two", "label": 1}, {"text": 'say "three"', "label": 0}, {"text": "four\nfive", "label": 1}]


# -- reading tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    table = read_table(save_rows(tmp_path / name, ROWS))
    assert table.columns == ("text", "label")
    assert [row["text"] for _, row in table.rows] == [row["text"] for row in ROWS]
    assert [int(row["label"]) for _, row in table.rows] == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y", "la', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", "[1, 2]\n", r"line 1: found list, expected one JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\xff\xfe\n', r"a\.jsonl, after line \d: not UTF-8"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.csv", "", "is empty; a header line"),
        ("a.csv", "text,label\nx\n", "line 2: 1 cells, the header names 2 columns"),
        ("a.csv", 'text,label\n"x,0\n', "line 2: not valid csv"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.xlsx", "x", r"unknown extension '\.xlsx'; expected \.jsonl"),
        ("a", "x", "unknown extension"),
    ],
)
def test_unreadable_files_name_themselves(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path / name, content))


def test_truncated_gzip_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl([{"text": f"t{i * 7919 % 1000}", "label": i % 2} for i in range(3000)]).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, after line \d+: damaged or truncated gzip"):
        read_table(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        read_table(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file .*nowhere\.jsonl"):
        read_table(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        read_table(tmp_path)


# -- classification data ----------------------------------------------------------------------


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    pair = [{"idx": 3, "sentence1": "a", "sentence2": "b", "label": i, "text": "no"} for i in range(2)]
    data = load(tmp_path, pair)
    assert [(e.text, e.pair, e.label) for e in data.train] == [("a", "b", 0), ("a", "b", 1)]
    assert load(tmp_path, ROWS).train[0].pair is None
    named = [{"review": "a", "stars": s} for s in ("low", "high")]
    data = load(tmp_path, named, text="review", label="stars")
    assert data.labels == ("high", "low")
    assert [e.label for e in data.train] == [1, 0]


def test_integer_labels_need_not_start_at_zero_nor_have_a_type(tmp_path: Path) -> None:
    data = load(tmp_path, [{"text": "a", "label": v} for v in (1, "2", 5.0, 2)])
    assert data.labels == ("1", "2", "5")
    assert [e.label for e in data.train] == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("train", "dev", "columns", "message"),
    [
        (ROWS, None, {"text": "body"}, r"no column 'body'; its columns are: text, label"),
        (ROWS, None, {"label": "gold"}, r"no column 'gold'; its columns are: text, label"),
        (ROWS, None, {"pair": "text"}, "needs a text column"),
        ([{"body": "a", "label": 0}], None, {}, "no text column found among body, label"),
        ([{"text": "a", "gold": 0}], None, {}, "no label column found among text, gold"),
        (ROWS, [{"text": "a"}], {}, r"dev\.jsonl has no column 'label'"),
        (
            [*ROWS, {"text": "a", "label": "yes"}],
            None,
            {},
            r"train.*, line 4: label 'yes' is a word among numbers",
        ),
        ([{"text": "a", "label": v} for v in ("yes", "no", 3)], None, {}, "line 3: label 3 is a number among words"),
        (
            ROWS,
            [{"text": "a", "label": 7}],
            {},
            r"dev\.jsonl, line 1: label 7 .* not occur in .*train\.jsonl.* 0, 1",
        ),
        ([*ROWS, {"text": "a", "label": -1}], None, {}, "line 4: label -1 .* is negative"),
        ([*ROWS, {"text": "a", "label": 0.5}], None, {}, "line 4: label 0.5 .* not a whole number"),
        ([*ROWS, {"text": "a", "label": None}], None, {}, "line 4: label None .* is a NoneType"),
        ([*ROWS, {"text": "a", "label": " "}], None, {}, "line 4: label ' ' .* is empty"),
        ([{"text": "a", "label": 1}], None, {}, "single class 1"),
        ([*ROWS, {"text": "  ", "label": 1}], None, {}, "line 4: column 'text' holds '  ', expected a text"),
        ([*ROWS, {"text": 4, "label": 1}], None, {}, "line 4: column 'text' holds 4, expected a text"),
    ],
)
def test_mislabelled_data_is_refused(
    tmp_path: Path,
    train: list[dict[str, object]],
    dev: list[dict[str, object]] | None,
    columns: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, train, dev, **columns)


def test_limit_draws_from_everywhere_and_floor_is_the_majority(tmp_path: Path) -> None:
    ordered = [{"text": f"t{i}", "label": int(i >= 60)} for i in range(100)]
    data = load(tmp_path, ordered)
    assert data.floor == 0.6
    few = data.limit(40, 10, seed=1)
    assert (len(few.train), len(few.validation)) == (40, 10)
    assert {e.label for e in few.train} == {0, 1}  # the first 40 are of one class
    assert few == data.limit(40, 10, seed=1) != data.limit(40, 10, seed=2)
    assert few.digest != data.digest
    with pytest.raises(ValueError, match="asked for 0 examples"):
        data.limit(0, None)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("glue/sst3", "unknown task 'glue/sst3'; known GLUE tasks: glue/cola"),
        ("glue/sst2", "cannot load task 'glue/sst2' .*--train-file .*stdlib-docs"),
    ],
)
def test_hub_tasks_that_cannot_be_had(task: str, message: str, tmp_path: Path) -> None:
    code = f"from topoprune.tasks import load_hub_task; load_hub_task({task!r})"
    # In a process of its own: the hub client reads where its cache lies on import.
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    if task == "glue/sst2":
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100)
        assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-2000:]
    else:
        with pytest.raises(ValueError, match=message):
            load_hub_task(task)


def test_reading_files_needs_neither_datasets_nor_torch(tmp_path: Path) -> None:
    train, dev = write_task(tmp_path)
    code = (
        "import sys; from topoprune.tasks import load_files; "
        f"load_files({str(train)!r}, {str(dev)!r}); "
        "print(sorted({'datasets', 'torch', 'transformers', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# -- the embedded task ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassificationData, Path]:
    cache = tmp_path_factory.mktemp("cache") / "deep" / "er"
    return load_docstrings(cache=cache), cache


def test_docstrings_are_many_balanced_and_do_not_leak(docs: tuple[ClassificationData, Path]) -> None:
    data, _ = docs
    assert len(data.train) + len(data.validation) > 4000
    assert data.labels == tuple(GROUPS)
    counts = Counter(e.label for e in data.train)
    assert set(counts) == set(range(len(GROUPS)))
    assert data.floor < 0.35
    assert 0.1 < len(data.validation) / len(data.train) < 0.25
    keys = [docstrings_module.text_key(e.text) for e in (*data.train, *data.validation)]
    assert len(set(keys)) == len(keys)  # no repetition, so none across the splits either
    assert all(in_validation(e.text) for e in data.validation)
    assert not any(in_validation(e.text) for e in data.train)


def test_docstrings_do_not_name_their_own_module(tmp_path: Path) -> None:
    for i in range(1100):
        (tmp_path / "socket").mkdir(exist_ok=True)
        number = " ".join(str(i))
        (tmp_path / "socket" / f"m{i}.py").write_text(
            f'"""The Socket of socket.py knows {number} and asyncio well."""\n'
        )
    (tmp_path / "socket" / "broken.py").write_text("def (:\n")
    (tmp_path / "socket" / "tests").mkdir()
    (tmp_path / "socket" / "tests" / "x.py").write_text('"""A test is no documentation of the library."""\n')
    (tmp_path / "unheard_of.py").write_text('"""A module without a group is left out of it."""\n')
    (tmp_path / "socket" / "twice.py").write_text('"""A text that two groups have word for word."""\n')
    (tmp_path / "turtle.py").write_text('"""A text that two groups have, word for word!"""\n')
    found = docstrings_module.collect_docstrings(tmp_path)
    assert len(found) == 1100
    assert all(group == "network" and "socket" not in text.lower() and "asyncio" in text for group, text in found)


def test_no_sources_of_the_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found only 0 docstrings under .*--train-file"):
        docstrings_module.collect_docstrings(tmp_path)


def test_the_cache_is_used_and_survives_damage(
    docs: tuple[ClassificationData, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = docs
    (file,) = cache.iterdir()
    whole = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(docstrings_module, "collect_docstrings", lambda *_: pytest.fail("read the sources again"))
        assert load_docstrings(cache=cache).digest == data.digest
    group_of = {label: i for i, label in enumerate(data.labels)}
    again = [(name, e.text) for name, i in group_of.items() for e in data.train if e.label == i]
    monkeypatch.setattr(docstrings_module, "collect_docstrings", lambda *_: again)
    file.write_text(whole[:-7])
    with pytest.warns(UserWarning, match="not readable"):
        assert load_docstrings(cache=cache).train == tuple(sorted(data.train, key=lambda e: e.label))
    assert json.loads(file.read_text())


def test_an_unwritable_cache_is_said_and_survived(
    docs: tuple[ClassificationData, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    some = [(name, f"{name} text number {i} of many") for name in GROUPS for i in range(150)]
    monkeypatch.setattr(docstrings_module, "collect_docstrings", lambda *_: some)
    with pytest.warns(UserWarning, match="cannot write the cache .*going on without it"):
        assert len(load_docstrings(cache=blocked / "below").train) > 1000


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "topoprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "topoprune"
