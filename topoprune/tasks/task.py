"""What a training run needs of a task: data, a model for it, how it is encoded and how it is scored."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from topoprune.tasks.settings import Training

__all__ = ["ModelSource", "NewModel", "Splits", "Task", "draw"]

T = TypeVar("T")
Splits = Mapping[str, Sequence[Any]]  # "train", "validation" and any others, encoded


@dataclass(frozen=True)
class NewModel:
    """A model that is built from a configuration, with random weights, instead of being loaded.

    Args:
        model_type: as transformers names it (``"t5"``, ``"gpt2"``, ``"vit"``).
        overrides: configuration fields that differ from the type's defaults.
        tokenizer: folder or hub id of a tokenizer; None trains one on the training texts.
        vocab_size: of a tokenizer that is trained.
    """

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    vocab_size: int = 8000

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"overrides": dict(self.overrides)}

    def __str__(self) -> str:
        overrides = ",".join(f"{name}={value}" for name, value in self.overrides.items())
        return f"new {self.model_type}" + (f" ({overrides})" if overrides else "")


ModelSource = str | Path | NewModel  # folder, hub id, "embedded", or a model to build


class Task(ABC):
    """One task with its data, ready to be trained on by `topoprune.tasks.train`.

    Subclasses are frozen dataclasses that hold the data; models, tokenizers and tensors come and go as arguments.

    Attributes:
        name: short, for people and result files. source: where the data comes from, one sentence.
        train, validation: examples (a task that keeps them elsewhere counts them itself).
        kind: ``"classification"``, ``"regression"``, ``"summarization"``, ``"translation"``, ...
        unit: what one example is, in the plural: ``"texts"``, ``"images"``, ``"blocks"``.
        main_metric: name of the figure that `evaluate` must hold and runs are compared by.
        higher_is_better: of the main metric.
        cuts_texts: whether ``Training.max_length`` says where.
    """

    name: str
    source: str
    train: Sequence[Any]
    validation: Sequence[Any]
    kind: str
    main_metric: str
    unit: str = "texts"
    higher_is_better: bool = True
    cuts_texts: bool = True

    # -- data -------------------------------------------------------------------------------------

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.train)

    @property
    def n_validation(self) -> int:
        """Number of validation examples."""
        return len(self.validation)

    @property
    @abstractmethod
    def digest(self) -> str:
        """Short hex digest of all data and of what shapes it: what a resumed run must have again."""

    @property
    @abstractmethod
    def floors(self) -> Mapping[str, float]:
        """Metrics of the simplest answer (the commonest class, the first sentence, ...): what to beat.

        Holds the main metric at least.
        """

    def floors_for(self, processor: Any, training: Training) -> Mapping[str, float]:
        """Return `floors` where they depend on the tokenizer; asked for after `evaluate`."""
        return self.floors

    @abstractmethod
    def limit(self, train: int | None, validation: int | None, seed: int = 0) -> Task:
        """Return a task with at most so many examples of each split, drawn with a seed (see `draw`)."""

    # -- model ------------------------------------------------------------------------------------

    def default_model(self) -> ModelSource:
        """Return the model that is trained when none is named."""
        return "embedded"

    @abstractmethod
    def load_processor(self, model: ModelSource, training: Training) -> Any:
        """Return what turns raw examples into model inputs: a tokenizer or an image processor.

        It has ``save_pretrained``; it is loaded before the model.
        """

    @abstractmethod
    def load_model(self, model: ModelSource, processor: Any, training: Training) -> Any:
        """Return the model with the head that the task needs; the seed has been set.

        Raises:
            ValueError: no such model, or one that cannot do this task.
        """

    # -- training and scoring ---------------------------------------------------------------------

    @abstractmethod
    def encode(self, processor: Any, network: Any, training: Training) -> Splits:
        """Return the examples as model inputs: ``"train"``, ``"validation"``, and other splits to score."""

    def collator(self, processor: Any, network: Any) -> Callable[[list[Any]], dict[str, Any]] | None:
        """Return what makes a batch of encoded examples; None stacks them."""
        return None

    def trainer_classes(self) -> tuple[Any, Any]:
        """Return the Trainer and the class of its arguments."""
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments

    def trainer_arguments(self, training: Training) -> Mapping[str, Any]:
        """Return arguments of the Trainer that this task sets, over those every run has."""
        return {}

    @abstractmethod
    def evaluate(self, trainer: Any, splits: Splits) -> dict[str, float]:
        """Return all metrics of the trained model by name, the main one among them."""


def draw(examples: Sequence[T], count: int | None, seed: int) -> tuple[T, ...]:
    """Return at most `count` examples, drawn without replacement; all of them in their order where there are no more.

    Drawn, not the first ones: files are often sorted by class.

    Raises:
        ValueError: a count below 1.
    """
    if count is None or count >= len(examples):
        return tuple(examples)
    if count < 1:
        raise ValueError(f"asked for {count} examples; expected at least 1")
    return tuple(random.Random(seed).sample(list(examples), count))
