"""Runs as YAML files: read one, and write the settings of a run so that it can be repeated."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topoprune.files import atomic_path
from topoprune.tasks.task import ModelSource, NewModel, Task

if TYPE_CHECKING:
    from topoprune.tasks.settings import Training

__all__ = ["RESOLVED", "SECTIONS", "read_config", "write_resolved"]

RESOLVED = "config.resolved.yaml"
SECTIONS = ("model", "data", "recipe", "training", "output")


def read_config(
    path: str | os.PathLike[str], known: Mapping[str, Collection[str]], aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Read settings from a YAML file, in sections or flat; null counts as not given.

    Scalars are read by the rules of YAML 1.2: ``5e-5`` is a number, ``2:4`` and ``no`` are texts.

    Args:
        path: the file.
        known: section -> names of its settings.
        aliases: other names of settings.

    Returns:
        Setting -> value.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a setting given twice, or an unknown one; lists those that exist.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no config file {source}")
    content = _parse(source)
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: found a {type(content).__name__}, expected settings as 'name: value'")
    found: dict[str, Any] = {}
    for name, section, value in _settings(source, content):
        target = (aliases or {}).get(name, name)
        allowed = known[section] if section else {setting for names in known.values() for setting in names}
        if target not in allowed:
            elsewhere = [other for other, names in known.items() if target in names]
            raise ValueError(f"{source}: {_unknown(name, section, elsewhere, sorted(allowed))}")
        if target in found:
            raise ValueError(f"{source}: {target} is given twice")
        found[target] = value
    return {name: value for name, value in found.items() if value is not None}


def _unknown(name: str, section: str | None, elsewhere: list[str], allowed: list[str]) -> str:
    where = f" in section {section}" if section else ""
    if elsewhere:
        return f"{name}{where}: it belongs to section {elsewhere[0]}"
    near = get_close_matches(name, allowed, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    sections = "" if section else f"; sections: {', '.join(SECTIONS)}"
    return f"unknown setting {name!r}{where}{hint} Known ones: {', '.join(allowed)}{sections}"


def _settings(source: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, str | None, Any]]:
    """Yield (name, section or None, value)."""
    for key, value in content.items():
        # `model: bert-base` is the setting of that name, `model: {...}` the section.
        if key in SECTIONS and (isinstance(value, Mapping) or (value is None and key != "model")):
            for name, inner in (value or {}).items():
                yield str(name).replace("-", "_"), str(key), inner
        elif key in SECTIONS and key != "model":
            raise ValueError(f"{source}: section {key} holds {value!r}, expected settings as 'name: value'")
        else:
            yield str(key).replace("-", "_"), None, value


def _parse(source: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Scalars by the core schema of YAML 1.2, and no key twice."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML has it

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for i, (key, (child, _)) in enumerate(zip(keys, node.value, strict=True)):
                if key in keys[:i]:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", child.start_mark)
            return dict(super().construct_mapping(node, deep))

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", "~nN\0"),
        ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ):
        letters = [letter if letter != "\0" else "" for letter in first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), letters)
    try:
        with source.open(encoding="utf-8") as file:
            return yaml.load(file, Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{source}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from error


def write_resolved(
    folder: Path,
    model: ModelSource,
    task: Task,
    recipe: Any,
    training: Training,
    *,
    compact: bool = False,
    data: Mapping[str, Any] | None = None,
    teacher: str | Path | None = None,
) -> Path:
    """Write all settings of a run into its folder, defaults included; return the file.

    ``topoprune train --config FILE`` repeats the run where the data was named as the command line does.
    """
    import yaml

    source: dict[str, Any]
    if isinstance(model, NewModel):
        source = {"model_type": model.model_type, "config_overrides": dict(model.overrides)}
        source |= {"tokenizer_name": model.tokenizer, "vocab_size": model.vocab_size}
    else:
        source = {"model": str(model)}
    chosen: dict[str, Any] = {"method": "dense"}
    if recipe is not None:
        chosen = {**recipe.to_dict(), "compact": compact, "teacher": teacher}
    if chosen["method"] == "fixed" and isinstance(chosen["plan"], str):
        chosen = {"plan": chosen["plan"]}
    settings = {
        "model": source,
        "data": dict(data or {}),
        "recipe": chosen,
        "training": {
            name: value for name, value in training.to_dict().items() if task.cuts_texts or name != "max_length"
        },
        "output": {"output_dir": str(folder)},
    }
    text = f"# {task.name}: {task.source}\n"
    if data is None:
        text += "# The data came from Python: name it in the section data to repeat this run from the command line.\n"
    text += yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True, width=120)
    with atomic_path(folder / RESOLVED) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / RESOLVED


def _plain(value: Any) -> Any:
    """Return a value made of what YAML knows, without settings that are not set."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
