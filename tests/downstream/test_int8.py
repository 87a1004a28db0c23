"""What eight bits cost: ONNX Runtime's dynamic quantisation of the embedded encoder, judged on real photographs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from perceptual_mae_models import FeatureExtractor
from training.data.images import ImageSource, keep_some
from training.evaluate.knn import knn_predict

TRAIN, VAL = 2000, 1000


class Models(NamedTuple):
    float32: Path
    int8: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The encoder with its patch tokens averaged, in both precisions, each in one file."""
    folder = tmp_path_factory.mktemp("onnx")
    paths = Models(folder / "float32.onnx", folder / "int8.onnx")
    encoder = timm.create_model("vit_pico_patch8_pmae", pretrained=True, global_pool="avg").eval()
    names = {"input_names": ["pixels"], "output_names": ["features"]}
    shapes = {"x": {0: torch.export.Dim("batch")}}
    example = torch.zeros(2, 3, 64, 64)
    program = torch.onnx.export(encoder, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.save(paths.float32, external_data=False)
    # Seven bits of the eight: the products of full ones overflow on processors without VNNI.
    options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
    quantize_dynamic(paths.float32, paths.int8, op_types_to_quantize=["MatMul"], **options)
    return paths


def encode(model: Path, pixels: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    batches = [session.run(None, {"pixels": part.numpy()})[0] for part in pixels.split(50)]
    return torch.from_numpy(np.concatenate(batches))


def test_int8_takes_less_than_a_third(models: Models):
    sizes = [path.stat().st_size for path in models]
    print(f"float32 {sizes[0] / 1e6:.2f} MB, int8 {sizes[1] / 1e6:.2f} MB: {sizes[1] / sizes[0]:.3f}")
    assert sizes[1] < sizes[0] / 3


def test_int8_features_point_the_same_way(models: Models, pixels: torch.Tensor):
    similarity = torch.cosine_similarity(encode(models.float32, pixels), encode(models.int8, pixels))
    assert similarity.min() > 0.999


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_int8_costs_little_accuracy(models: Models, real_data: Path):
    extractor = FeatureExtractor()
    pixels, labels = {}, {}
    for split, limit in (("train", TRAIN), ("val", VAL)):
        source = keep_some(ImageSource(real_data / f"imagenette-128-{split}.tar"), limit)
        pixels[split] = torch.stack([extractor.transform(source.load(index)) for index in range(len(source))])
        labels[split] = torch.tensor(source.labels)

    found = {}
    for precision, path in models._asdict().items():
        train, val = encode(path, pixels["train"]), encode(path, pixels["val"])
        voted = knn_predict(train, labels["train"], val, [20])[20]
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        probe.fit(train.numpy(), labels["train"].numpy())
        knn = 100 * (voted == labels["val"]).double().mean().item()
        linear = 100 * probe.score(val.numpy(), labels["val"].numpy())
        print(f"{precision}: k-NN {knn:.1f} %, linear {linear:.1f} %")
        found[precision] = np.array([knn, linear])
    # A point is less than the standard error of either figure, 1.5 points for a thousand images.
    assert (found["float32"] - found["int8"]).max() <= 1.0
    assert found["float32"].min() >= 40
