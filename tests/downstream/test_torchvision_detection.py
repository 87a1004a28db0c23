"""torchvision's Faster R-CNN on a `features_only` encoder: one map, at the size of the resized images."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

SIDE = 128


class Backbone(nn.Module):
    """What torchvision asks of a backbone: one map, and `out_channels`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model(
            "vit_pico_patch8_pmae", pretrained=True, features_only=True, out_indices=(7,), img_size=SIDE
        )
        (self.out_channels,) = self.encoder.feature_info.channels()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)[0]


@pytest.fixture
def detector() -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(
        Backbone(),
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2),
        fixed_size=(SIDE, SIDE),  # an image beyond it would be padded, and a ViT takes one size
    )


@pytest.fixture
def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Bright squares on grey, in images of different sizes."""
    images, targets = [], []
    for (height, width), (left, top) in zip([(100, 120), (90, 60)], [(20, 30), (10, 40)], strict=True):
        image = torch.full((3, height, width), 0.4)
        image[:, top : top + 40, left : left + 40] = torch.tensor([1.0, 0.2, 0.1])[:, None, None]
        images.append(image)
        box = torch.tensor([[left, top, left + 40, top + 40]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([1])})
    return images, targets


def test_the_pretrained_encoder_is_inside(encoder: VisionTransformer, detector: FasterRCNN):
    inside = detector.backbone.encoder.model
    assert torch.equal(inside.blocks[7].mlp.fc2.weight, encoder.blocks[7].mlp.fc2.weight)


def test_it_trains_and_gives_boxes(detector: FasterRCNN, scenes: tuple[list[Tensor], list[dict[str, Tensor]]]):
    images, targets = scenes
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-4)
    totals = []
    for _ in range(8):
        losses = detector.train()(images, targets)
        assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        total = sum(losses.values())
        assert total.isfinite()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
    assert all(weight.grad is not None for weight in detector.backbone.parameters())

    with torch.inference_mode():
        results = detector.eval()(images)
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[1:]
        assert len(result["boxes"]) == len(result["scores"]) == len(result["labels"]) > 0
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([width, height, width, height])).all()
