"""scikit-learn on our features: the file of `pmae embed`, and the extractor as a step of a pipeline."""

import json
from pathlib import Path

import joblib
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from perceptual_mae_models import FeatureExtractor, cli

TRAIN, TEST = 300, 150
# Rows in a wrong order would give 0.10. Measured: 0.833, and 0.773 with random weights.
SENSIBLE = 0.8


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], np.ndarray]:
    """450 handwritten digits as files: scikit-learn's, 8 x 8 pixels and grey."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    paths = []
    for number, (image, label) in enumerate(zip(data.images[: TRAIN + TEST], data.target, strict=False)):
        path = folder / f"{number:03d}_{label}.png"
        Image.fromarray((image * 15).astype(np.uint8)).save(path)
        paths.append(path)
    return paths, data.target[: TRAIN + TEST]


def classifier() -> list[object]:
    return [StandardScaler(), LogisticRegression(max_iter=2000)]


def test_features_of_the_command_feed_a_classifier(digits: tuple[list[Path], np.ndarray], tmp_path: Path):
    paths, _ = digits
    assert cli.main(["embed", str(paths[0].parent), "-o", str(tmp_path / "features.npz")]) == 0
    file = np.load(tmp_path / "features.npz")
    assert json.loads(str(file["metadata"]))["model"] == "vit_pico_patch8_pmae"
    labels = [int(Path(name).stem.split("_")[1]) for name in file["names"]]
    model = make_pipeline(*classifier()).fit(file["features"][:TRAIN], labels[:TRAIN])
    accuracy = model.score(file["features"][TRAIN:], labels[TRAIN:])
    print(f"digits, {TRAIN} for training: {accuracy:.3f}")
    assert accuracy >= SENSIBLE


def test_the_extractor_is_a_step_of_a_pipeline(digits: tuple[list[Path], np.ndarray], tmp_path: Path):
    paths, labels = digits
    pipeline = make_pipeline(FunctionTransformer(FeatureExtractor()), *classifier())
    pipeline.fit(paths[:TRAIN], labels[:TRAIN])
    predicted = pipeline.predict(paths[TRAIN:])
    assert (predicted == labels[TRAIN:]).mean() >= SENSIBLE

    joblib.dump(pipeline, tmp_path / "pipeline.joblib")
    assert (joblib.load(tmp_path / "pipeline.joblib").predict(paths[TRAIN:]) == predicted).all()


def test_the_extractor_takes_arrays_and_cross_validation(digits: tuple[list[Path], np.ndarray]):
    paths, labels = digits
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths[:TRAIN]])
    pipeline = make_pipeline(FunctionTransformer(FeatureExtractor(pool="cls+avg")), *classifier())
    assert cross_val_score(pipeline, images, labels[:TRAIN], cv=2).mean() >= SENSIBLE
