"""Plans in files: back bit for bit, and damaged, altered or foreign files refused."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plantools import graph_of
from topoprune import Plan, solve
from topoprune.files import read_npz, write_npz


def same_plan(one: Plan, two: Plan) -> None:
    assert one.sites == two.sites
    assert one.weights_digest == two.weights_digest and one.structure_digest == two.structure_digest
    assert dict(one.edge_axes) == dict(two.edge_axes)
    assert json.loads(json.dumps(dict(one.request))) == dict(two.request)
    assert list(one.solutions) == list(two.solutions)
    for name, a in one.solutions.items():
        b = two.solutions[name]
        for field in ("keep", "dominator", "dominator_distance"):
            x, y = getattr(a, field), getattr(b, field)
            assert (x is None) == (y is None)
            assert x is None or (x.dtype == y.dtype and np.array_equal(x, y))
        for field in ("objective", "sense", "status", "solver", "bound", "seconds"):
            assert getattr(a, field) == getattr(b, field), field


@pytest.mark.parametrize("family", ["bert", "t5-gated", "llama", "gpt2"])
@pytest.mark.parametrize(
    "request_",
    [
        {"theta": "auto:0.4"},
        {"budget": 1, "solver": "random"},
        {"budget": 0.5, "problem": "neurons"},
        {"budget": 0.5, "problem": "edges", "attachment": 0.5},
    ],
)
def test_a_plan_comes_back_from_its_file_bit_for_bit(family: str, request_: dict[str, Any], tmp_path: Path) -> None:
    plan = solve(graph_of(family), **request_)
    path = plan.save(tmp_path / "plan")
    assert path.name == "plan.npz" and [p.name for p in tmp_path.iterdir()] == ["plan.npz"]
    same_plan(plan, Plan.load(path))
    combined = plan | Plan(plan.sites, {})
    same_plan(combined, Plan.load(combined.save(path)))  # overwriting is fine


def damaged(path: Path, change: Any) -> Path:
    header, arrays = read_npz(path, "topoprune.Plan", 99)
    change(header, arrays)
    return write_npz(path, header, arrays)


def test_an_altered_or_newer_plan_file_is_refused(tmp_path: Path) -> None:
    path = solve(graph_of("bert"), budget=2).save(tmp_path / "plan.npz")

    def rename(header: Any, arrays: Any) -> None:
        header["sites"][0]["unit_width"] += 1

    with pytest.raises(ValueError, match="altered"):
        Plan.load(damaged(path, rename))
    path = solve(graph_of("bert"), budget=2).save(path)
    with pytest.raises(ValueError, match=r"schema version 42.*upgrade"):
        Plan.load(damaged(path, lambda header, arrays: header.update(schema_version=42)))


def test_a_file_with_missing_parts_is_refused_by_name(tmp_path: Path) -> None:
    plan = solve(graph_of("bert"), budget=2)

    def drop_array(header: Any, arrays: Any) -> None:
        arrays.pop(next(key for key in arrays if key.startswith("keep/")))

    def drop_solutions(header: Any, arrays: Any) -> None:
        header.pop("solutions")

    for change in (drop_array, drop_solutions):
        path = plan.save(tmp_path / "plan.npz")
        with pytest.raises(ValueError, match=r"plan\.npz"):
            Plan.load(damaged(path, change))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not a plan")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "arrays.npz", keep=np.zeros(3))
    for name in ("text.npz", "empty.npz", "array.npy", "arrays.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable topoprune\.Plan file"):
            Plan.load(tmp_path / name)
    graph = graph_of("bert").save(tmp_path / "graph.npz")
    with pytest.raises(ValueError, match=r"holds a 'topoprune\.ModelGraph'"):
        Plan.load(graph)
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        Plan.load(tmp_path / "missing.npz")
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        solve(graph_of("bert"), budget=2).save(tmp_path / "nowhere" / "plan.npz")


@lru_cache
def plan_bytes() -> tuple[Plan, bytes]:
    import tempfile

    plan = solve(graph_of("bert"), budget=2)
    with tempfile.TemporaryDirectory() as folder:
        return plan, plan.save(Path(folder) / "plan.npz").read_bytes()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_refused_and_a_flipped_byte_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan, whole = plan_bytes()
    path = tmp_path_factory.mktemp("bytes") / "plan.npz"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"plan\.npz"):
        Plan.load(path)
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    try:
        loaded = Plan.load(path)
    except ValueError as error:
        assert "plan.npz" in str(error)
    else:
        same_plan(plan, loaded)
