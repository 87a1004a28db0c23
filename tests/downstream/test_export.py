"""torch.compile, torch.export and ONNX: one graph for every batch size, the same numbers."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

BATCHES = (1, 2, 7)
BATCH = {"x": {0: torch.export.Dim("batch")}}
# float32 sums in another order; the features themselves are of the order of 1.
TOLERANCE = 1e-4


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def test_torch_export_takes_any_batch_and_comes_back_from_disk(encoder: VisionTransformer, tmp_path: Path):
    program = torch.export.export(encoder, (images(2),), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    with torch.inference_mode():
        for batch in BATCHES:
            torch.testing.assert_close(loaded(images(batch)), encoder(images(batch)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"num_classes": 5}, {"global_pool": ""}])
def test_onnx_takes_any_batch(kwargs: dict[str, object], tmp_path: Path):
    model = timm.create_model("vit_pico_patch8_pmae", pretrained=True, **kwargs).eval()
    path = tmp_path / "encoder.onnx"
    names = {"input_names": ["pixels"], "output_names": ["features"]}
    program = torch.onnx.export(model, (images(2),), dynamo=True, dynamic_shapes=BATCH, verbose=False, **names)
    program.save(path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        for batch in BATCHES:
            (found,) = session.run(["features"], {"pixels": images(batch).numpy()})
            np.testing.assert_allclose(found, model(images(batch)).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torch_compile_gives_the_same(encoder: VisionTransformer):
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in BATCHES[1:]:
            torch.testing.assert_close(compiled(images(batch)), encoder(images(batch)), rtol=0, atol=TOLERANCE)
