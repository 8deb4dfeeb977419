"""Guards of the package itself: what importing costs, what is public, that it is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType

import pytest

import topoprune
import topoprune_solvers

PACKAGES = (topoprune, topoprune_solvers)
MAX_LINES = 500

# The public names of topoprune. A change here is a change of the API: note it in CHANGELOG.md.
PUBLIC = [
    "BipartiteGraph",
    "Comparison",
    "Equivalence",
    "Graph",
    "MaskHandle",
    "ModelGraph",
    "Plan",
    "Pruner",
    "Recipe",
    "Site",
    "Sparsity",
    "TensorSlice",
    "TopoPruneCallback",
    "apply",
    "check_equivalence",
    "compact",
    "compare",
    "connectivity_sd",
    "export",
    "extract",
    "find_sites",
    "kept_units",
    "load",
    "measure_sparsity",
    "push_to_hub",
    "read_graph",
    "register_family",
    "save",
    "solve",
    "write_graph",
]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        names.append(package.__name__)
        names += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return names


MODULES = modules()


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_importing_topoprune_is_light_and_starts_no_cuda() -> None:
    heavy = ["torch", "ortools", "datasets", "matplotlib", "transformers", "igraph", "networkx", "accelerate", "pandas"]
    code = f"""
import sys
import topoprune
print(sorted(set({heavy!r}) & set(sys.modules)))
import torch
print(torch.cuda.is_initialized())
"""
    assert run_python(code).strip().split() == ["[]", "False"]


def test_solvers_import_and_solve_without_torch() -> None:
    code = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "topoprune", "transformers"}:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import numpy as np
import topoprune_solvers as ts

problem = ts.EdgeSelection(np.eye(3), 3)
assert ts.solve(problem, "greedy").objective == 3.0
assert "torch" not in sys.modules and "topoprune" not in sys.modules
print(sorted({"ortools", "igraph", "networkx"} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


def test_public_names_are_pinned() -> None:
    assert sorted(topoprune.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(topoprune, name) is not None


@pytest.mark.parametrize("first", ["apply", "solve", "Pruner", "find_sites"])
def test_public_functions_are_functions_whatever_is_imported_first(first: str) -> None:
    # A subpackage of the same name would take the place of the function once it is imported.
    code = f"""
import topoprune
topoprune.{first}
print([n for n in topoprune.__all__ if not callable(getattr(topoprune, n))])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_documented_and_of_readable_size(name: str) -> None:
    module = load(name)
    path = Path(str(module.__file__))
    source = path.read_text(encoding="utf-8")
    if source.strip():
        assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    lines = source.count("\n")
    assert lines <= MAX_LINES, f"{name} has {lines} lines, at most {MAX_LINES} are meant; split it"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_and_classes_have_docstrings(name: str) -> None:
    module = load(name)
    bare = []
    for label, thing in vars(module).items():
        if label.startswith("_") or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if thing.__module__ != name:
            continue
        # The text a dataclass makes up for itself ("Name(field: type)") explains nothing.
        if not thing.__doc__ or thing.__doc__.startswith(f"{label}("):
            bare.append(label)
        if inspect.isclass(thing):
            bare += [
                f"{label}.{member}"
                for member, function in vars(thing).items()
                if inspect.isfunction(function) and not member.startswith("_") and not inspect.getdoc(function)
            ]
    assert not bare, f"{name}: no docstring on {', '.join(bare)}"


@pytest.mark.parametrize("name", MODULES)
def test_all_lists_names_that_exist(name: str) -> None:
    module = load(name)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names), f"{name}.__all__ names something twice"
    assert [n for n in names if not hasattr(module, n)] == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_packages_are_typed(package: ModuleType) -> None:
    assert (Path(str(package.__file__)).parent / "py.typed").is_file()


def test_version_is_that_of_the_distribution() -> None:
    assert topoprune.__version__ == version("topoprune")


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="topoprune")
    assert callable(command.load())


def test_no_module_imports_a_private_name_of_another() -> None:
    ours = {package.__name__ for package in PACKAGES}
    found = []
    for name in MODULES:
        tree = ast.parse(Path(str(load(name).__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ours:
                found += [f"{name}: {a.name}" for a in node.names if a.name.startswith("_") and a.name != "__version__"]
    assert not found, f"private names imported across modules: {found}"
