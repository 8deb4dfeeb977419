"""The digits: a fair split, and every recipe on ViTs that are built or loaded."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.tinytask import save_model
from topoprune import Recipe, load
from topoprune.tasks import NewModel, Training, load_digits, train
from topoprune.tasks.vision import DIGITS_VIT, ImageTask

pytest.importorskip("sklearn")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL = NewModel("vit", {**DIGITS_VIT.overrides, **SIZES, "initializer_range": 0.2})
BRIEF = Training(epochs=1, batch_size=16, learning_rate=2e-3)


@pytest.fixture(scope="module")
def digits() -> ImageTask:
    return load_digits()


def test_the_split_holds_out_a_fifth_of_every_class(digits: ImageTask) -> None:
    assert digits.n_train + digits.n_validation == 1797
    train_counts, held_out = (Counter(i.label for i in part) for part in (digits.train, digits.validation))
    assert set(held_out) == set(range(10))
    for label, count in held_out.items():
        assert count == round(0.2 * (count + train_counts[label]))
    assert digits.floors["accuracy"] < 0.12
    assert digits.digest == load_digits().digest != load_digits(seed=1).digest
    assert digits.limit(40, 20).n_train == 40 and digits.limit(40, 20).digest != digits.digest


@pytest.mark.parametrize(
    "recipe",
    [None, Recipe.budget(0.5), Recipe.budget(heads=4), Recipe.neuroprune(0.5, 0.5, "auto:0.2")],
    ids=["dense", "budget", "heads", "neuroprune"],
)
def test_recipes_prune_a_vit(digits: ImageTask, tmp_path: Path, recipe: object) -> None:
    task = digits.limit(160, 40)
    result = train(SMALL, task, recipe, output_dir=tmp_path, training=BRIEF)  # type: ignore[arg-type]
    assert (result.kind, result.metric, result.steps) == ("image-classification", "accuracy", 10)
    assert 0 <= result.score <= 1 and result.heads_total == (4, 4)
    if isinstance(recipe, type(Recipe.budget(0.5))):
        if recipe.sparsity is not None:
            assert abs(result.removable - recipe.sparsity) < 0.02
        else:
            assert sum(result.heads) == recipe.heads
    saved = ViTForImageClassification.from_pretrained(tmp_path)
    assert saved.config.id2label == {i: str(i) for i in range(10)}
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(
        [image.pixels[:, :, None] for image in task.validation], return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        answers = saved.eval()(**pixels).logits.argmax(dim=1).numpy()
    assert np.mean(answers == [image.label for image in task.validation]) == result.score


def test_a_compacted_run_can_be_trained_further(digits: ImageTask, tmp_path: Path) -> None:
    task = digits.limit(160, 40)
    first = train(SMALL, task, Recipe.budget(0.5), output_dir=tmp_path / "a", training=BRIEF, compact=True)
    assert load(tmp_path / "a").vit.layers[0].attention.q_proj.weight.shape[0] < 24
    second = train(tmp_path / "a", task, output_dir=tmp_path / "b", training=BRIEF)
    assert second.heads == first.heads and second.neurons == first.neurons


def test_the_digits_are_learnt(digits: ImageTask, tmp_path: Path) -> None:
    settings = Training(epochs=4, batch_size=16, learning_rate=5e-3, warmup=0.1)
    assert train(SMALL, digits.limit(600, 150), output_dir=tmp_path, training=settings).score > 0.5


def test_a_checkpoint_with_other_images_sees_the_digits_in_its_size(digits: ImageTask, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        num_labels=3,
        architectures=["ViTForImageClassification"],
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"has no image processor \(preprocessor_config.json\)"):
        train(tmp_path / "vit", digits, output_dir=tmp_path / "run", training=BRIEF)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    with pytest.warns(UserWarning, match="was trained for 3 classes, this task has 10"):
        result = train(tmp_path / "vit", digits.limit(32, 16), output_dir=tmp_path / "run", training=BRIEF)
    assert result.steps == 2


def test_a_text_model_is_refused(digits: ImageTask, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images need a ViT, not a text model"):
        train(save_model(tmp_path / "bert"), digits, output_dir=tmp_path / "run", training=BRIEF)
    with pytest.raises(ValueError, match="cannot build a new bert"):
        train(NewModel("bert"), digits, output_dir=tmp_path / "run", training=BRIEF)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'topoprune\[vision\]'"):
        load_digits()
