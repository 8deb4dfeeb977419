"""A pruned model on another task: its masks or its shapes stay, its head may be a new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topoprune.compaction.modeling_topoprune import KEY
from topoprune.tasks.models import resolve_model
from topoprune.tasks.monitor import quiet_libraries

if TYPE_CHECKING:
    from topoprune.train.fixed import FixedPlanRecipe

__all__ = ["PLAN_FILE", "is_compacted", "kept_masks", "load_under"]

PLAN_FILE = "plan.npz"  # what a run writes beside its model


def kept_masks(model: str | Path, plan: str | os.PathLike[str] | None = None) -> FixedPlanRecipe | None:
    """Return the recipe that holds the masks of a pruned model in training.

    Args:
        model: folder that a run wrote. plan: file with its plan; default: ``plan.npz`` in that folder.

    Returns:
        The recipe; None for a compacted folder, from which the masked units are gone: training keeps it so.

    Raises:
        FileNotFoundError: no such folder or plan.
        ValueError: a folder without a plan, a plan beside a compacted model, or a file that is not a plan.
    """
    from topoprune.train.fixed import fixed_plan

    folder = Path(resolve_model(model))
    if is_compacted(model):
        if plan is not None:
            raise ValueError(
                f"{model} is compacted: what was pruned is cut out of it, so there are no masks to keep and --plan "
                "has no effect; leave it out"
            )
        return None
    if plan is not None:
        return fixed_plan(plan)
    if not (folder / PLAN_FILE).is_file():
        raise ValueError(
            f"{model} has no {PLAN_FILE}, which training with a recipe writes beside its model; give the plan with "
            "--plan FILE, or a folder that has one"
        )
    return fixed_plan(folder / PLAN_FILE)


def is_compacted(model: str | Path) -> bool:
    """Return whether a folder (or hub id) holds a model from which units were cut out; no weights are read."""
    from transformers import AutoConfig

    folder = Path(resolve_model(model))
    if not folder.is_dir():
        return False
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return False  # loading it says what is wrong
    return getattr(config, KEY, None) is not None


def load_under(model: str | Path, auto_class: Any, **config: Any) -> tuple[Any, list[str]]:
    """Return a model under a task head of another size, and the names of the weights that are new.

    Args:
        model: folder or hub id, dense or compacted.
        auto_class: of transformers, e.g. ``AutoModelForSequenceClassification``.
        config: for the head, e.g. ``num_labels=3, id2label={...}``.

    Raises:
        ValueError: damaged files, a family without such a head, or files without some weights of the body: only
            a head may begin with random numbers.
    """
    from transformers import AutoConfig

    where = resolve_model(model)
    with quiet_libraries():
        try:
            cls = auto_class
            if is_compacted(model):
                from topoprune.compaction.modeling_topoprune import compact_class

                made = AutoConfig.from_pretrained(where)
                known: Any = auto_class._model_mapping  # what AutoModelFor… itself looks a class up in
                if type(made) not in known:
                    raise ValueError(f"{auto_class.__name__} has no class for {type(made).__name__}")
                stock = known[type(made)]
                cls = compact_class(stock[0] if isinstance(stock, tuple) else stock)
                config = {**config, "use_safetensors": True}
            loaded, info = cls.from_pretrained(where, output_loading_info=True, ignore_mismatched_sizes=True, **config)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
            raise ValueError(f"cannot load {str(model)!r} under {auto_class.__name__}: {first}") from error
    new = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    prefix = f"{getattr(loaded, 'base_model_prefix', '')}."
    body = [name for name in new if name.startswith(prefix) and ".pooler." not in f".{name}"]
    if body:
        raise ValueError(
            f"the files of {str(model)!r} lack {len(body)} weights of a {type(loaded).__name__}'s body or have them in "
            f"other shapes, {body[0]!r} first: they would be random numbers"
        )
    return loaded, new
