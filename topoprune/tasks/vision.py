"""Image classification as a `Task`: the handwritten digits that scikit-learn brings along.

1,797 grey images of 8 x 8 pixels in ten classes, on every machine with scikit-learn: nothing is downloaded.

References: Kaynak 1995, UCI optical recognition of handwritten digits; Dosovitskiy et al. 2021, ViT (arXiv 2010.11929).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoprune.tasks.metrics import score, simplest_scores
from topoprune.tasks.settings import Training
from topoprune.tasks.task import ModelSource, NewModel, Splits, Task, draw

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DIGITS_VIT", "Image", "ImageTask", "load_digits"]

_VALIDATION_SHARE = 0.2
_PATCH = 2
# 0.4 M parameters: 16 patches of 2 x 2 pixels. Learns the digits in a minute on a small CPU.
DIGITS_VIT = NewModel(
    "vit",
    {
        "image_size": 8,
        "patch_size": _PATCH,
        "num_channels": 1,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": 384,
    },
)
_ONE_CHANNEL = {"image_mean": [0.5], "image_std": [0.5]}


@dataclass(frozen=True, eq=False)
class Image:
    """One image and its class.

    Args:
        pixels: (height, width), grey values from 0 to 255, uint8. label: index of the class.
    """

    pixels: NDArray[np.uint8]
    label: int


@dataclass(frozen=True)
class ImageTask(Task):
    """Classes of images.

    Args:
        name, source: see `Task`. labels: class names, in index order.
        train, validation: images, all of one size.
    """

    name: str
    source: str
    labels: tuple[str, ...]
    train: tuple[Image, ...]
    validation: tuple[Image, ...]
    kind: str = "image-classification"
    unit: str = "images"
    main_metric: str = "accuracy"
    cuts_texts: bool = False

    @property
    def digest(self) -> str:
        """Short hex digest of all pixels and labels."""
        state = hashlib.sha256(repr((self.labels, self.n_train)).encode())
        for image in (*self.train, *self.validation):
            state.update(repr((image.label, image.pixels.shape)).encode() + image.pixels.tobytes())
        return state.hexdigest()[:16]

    @property
    def floors(self) -> Mapping[str, float]:
        """Accuracy of always answering the commonest training class."""
        train = np.array([image.label for image in self.train])
        return simplest_scores(("accuracy",), train, self._truth(), regression=False)

    def limit(self, train: int | None, validation: int | None, seed: int = 0) -> ImageTask:
        """Return a task with at most so many images of each split."""
        return replace(self, train=draw(self.train, train, seed), validation=draw(self.validation, validation, seed))

    def default_model(self) -> ModelSource:
        """Return a small ViT with random weights."""
        return DIGITS_VIT

    def load_processor(self, model: ModelSource, training: Training) -> Any:
        """Return the model's image processor, or for a new model one that keeps the images' size.

        Raises:
            ValueError: no Pillow, or a folder without image processor.
        """
        try:
            import PIL  # noqa: F401 - transformers' processors need it
            from transformers import AutoImageProcessor
            from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
        except ImportError as error:
            raise ValueError(f"images need Pillow ({error}): pip install 'topoprune[vision]'") from None
        if isinstance(model, NewModel):
            side = int(model.overrides.get("image_size", 224))
            gray = int(model.overrides.get("num_channels", 3)) == 1
            return ViTImageProcessorPil(size={"height": side, "width": side}, **(_ONE_CHANNEL if gray else {}))
        from topoprune.tasks.models import load_pretrained, resolve_model

        where = Path(resolve_model(model))
        if where.is_dir() and not (where / "preprocessor_config.json").is_file():
            raise ValueError(
                f"{model} has no image processor (preprocessor_config.json); images need a ViT, not a text model"
            )
        return load_pretrained(AutoImageProcessor.from_pretrained, model)

    def load_model(self, model: ModelSource, processor: Any, training: Training) -> Any:
        """Return the model with a head for these classes."""
        from transformers import AutoModelForImageClassification

        from topoprune.tasks.models import classification_head, load_headed, new_network

        head = classification_head(self.labels)
        if isinstance(model, NewModel):
            return new_network(model, AutoModelForImageClassification, head)
        return load_headed(AutoModelForImageClassification, model, head)

    def encode(self, processor: Any, network: Any, training: Training) -> Splits:
        """Return pixels as the model wants them, and labels."""
        channels = getattr(network.config, "num_channels", 3)
        splits = {"train": self.train, "validation": self.validation}
        return {name: _encode(processor, images, channels) for name, images in splits.items()}

    def evaluate(self, trainer: Any, splits: Splits) -> dict[str, float]:
        """Return the accuracy on the validation images."""
        predicted = trainer.predict(splits["validation"]).predictions
        logits = np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted)
        return score(("accuracy",), logits.argmax(axis=1), self._truth())

    def _truth(self) -> NDArray[np.int64]:
        return np.array([image.label for image in self.validation])


def load_digits(*, seed: int = 0) -> ImageTask:
    """Return the embedded task: which digit is it? A fifth of the images is held out.

    Args:
        seed: of the split; every class is held out in the same share.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install 'topoprune[vision]'") from None
    found = datasets.load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)  # as published: whole numbers up to 16
    held_out = np.zeros(len(pixels), dtype=bool)
    random = np.random.default_rng(seed)
    for label in range(10):
        members = np.flatnonzero(found.target == label)
        held_out[random.permutation(members)[: round(_VALIDATION_SHARE * len(members))]] = True
    images = [Image(values, int(label)) for values, label in zip(pixels, found.target, strict=True)]
    return ImageTask(
        name="digits",
        source=f"embedded: {len(images):,} handwritten digits of 8 x 8 pixels from scikit-learn",
        labels=tuple(str(label) for label in range(10)),
        train=tuple(image for image, out in zip(images, held_out, strict=True) if not out),
        validation=tuple(image for image, out in zip(images, held_out, strict=True) if out),
    )


def _encode(processor: Any, images: tuple[Image, ...], channels: int) -> list[dict[str, Any]]:
    if channels not in (1, 3):
        raise ValueError(f"the model reads images of {channels} channels; grey images serve models of 1 or 3")
    # Last axis: a leading one is not told from a row of pixels.
    stacked = [np.repeat(image.pixels[:, :, None], channels, axis=2) for image in images]
    values = processor(stacked, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    return [
        {"pixel_values": np.asarray(pixels, dtype=np.float32), "labels": image.label}
        for pixels, image in zip(values, images, strict=True)
    ]
