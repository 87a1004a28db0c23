"""What can be evaluated, by the names that users type.

| model | |
|---|---|
| `vit_base_patch16_pmae.fb_mae_in1k`, any timm name | with its published weights |
| `hf-hub:user/name` | a timm model of the Hugging Face Hub |
| `vit_pico_patch8_pmae@runs/mine` | a timm architecture with the weights of a run's folder, or of a file |
| `vit_pico_patch8_pmae@random` | the same with random weights: what the architecture alone is worth |
| `pixels:16` | no model: the image itself at 16 x 16 |
"""

from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perceptual_mae_models.autoencoder import MaskedAutoencoder
from perceptual_mae_models.building import check_model_name, weights_file
from perceptual_mae_models.features import FeatureExtractor, Precision
from training.evaluate.features import fingerprint_model, fingerprint_weights
from training.recipes import Recipe
from training.weights import open_embedded, open_run

RANDOM = "random"
PIXELS = "pixels:"
"""The beginning of names of no model: nothing that learns."""


class Pixels(nn.Module):
    """The image as its own feature: (N, 3, s, s) -> (N, 3 * s * s, 1, 1).

    Args:
        size: Side of the image in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "architecture": f"pixels:{size}",
            "input_size": (3, size, size),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
        }

    def forward_features(self, images: Tensor) -> Tensor:
        """The pixels as channels of a map of one place."""
        return images.flatten(1)[:, :, None, None]


def open_model(
    name: str, *, device: str | None = None, dtype: Precision = "float32", seed: int = 0
) -> tuple[FeatureExtractor, dict[str, slice]]:
    """Build what a name means.

    Args:
        name: See the table above.
        device: Where; by default a GPU where there is one.
        dtype: Arithmetic of the encoder.
        seed: Decides random weights.

    Returns:
        The extractor of every representation, and the columns of each: `cls`, `avg` and `cls+avg` where there is a
        class token, else `avg`.

    Raises:
        ValueError: If the name means nothing.
        FileNotFoundError: If there is no such file of weights.
    """
    if name.startswith(PIXELS):
        extractor = FeatureExtractor(Pixels(_pixels(name)), "avg", device or "cpu", dtype)
        return extractor, {"avg": slice(None)}
    architecture, _, weights = name.partition("@")
    torch.manual_seed(seed)
    checkpoint = weights if weights and weights != RANDOM else None
    extractor = FeatureExtractor(
        architecture, "avg", device, dtype, checkpoint=checkpoint, pretrained=weights != RANDOM
    )
    if getattr(extractor.model, "cls_token", None) is None:
        return extractor, {"avg": slice(None)}
    both = FeatureExtractor(extractor.model, "cls+avg", extractor.device, dtype)
    both.metadata = {**extractor.metadata, "pool": "cls+avg"}
    width = both.feature_shape[0] // 2
    return both, {"cls": slice(0, width), "avg": slice(width, None), "cls+avg": slice(None)}


def check_name(name: str) -> None:
    """Refuse a name that means nothing, without building anything.

    Raises:
        ValueError: If it does not.
        FileNotFoundError: If there is no such file of weights.
    """
    if name.startswith(PIXELS):
        _pixels(name)
        return
    architecture, _, weights = name.partition("@")
    check_model_name(architecture)
    if weights and weights != RANDOM and not weights_file(Path(weights)).is_file():
        raise FileNotFoundError(f"{name}: no such file of weights")


def _pixels(name: str) -> int:
    size = name.removeprefix(PIXELS)
    if not size.isdigit() or not int(size):
        raise ValueError(f"{name}: give the side of the image in pixels, such as pixels:16")
    return int(size)


def describe_model(name: str, seed: int = 0) -> dict[str, int | float | str]:
    """What a name stands for: fingerprints, parameters, and the cost of an image.

    Args:
        name: See the table above.
        seed: Decides random weights.

    Returns:
        `fingerprint` of everything that decides features, and of `weights` alone, `parameters`, and `gflop`: 10^9
        operations of a forward pass (a product and its sum are two).
    """
    extractor, _ = open_model(name, device="cpu", seed=seed)
    # fused attention on the CPU is a single operation that the counter does not know
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        extractor.model.forward_features(torch.zeros(1, 3, *extractor.input_size))
    parameters = sum(parameter.numel() for parameter in extractor.model.parameters())
    gflop = counter.get_total_flops() / 1e9
    prints = {"fingerprint": fingerprint_model(extractor), "weights": fingerprint_weights(extractor.model)}
    return {**prints, "parameters": parameters, "gflop": gflop}


def open_autoencoder(name: str) -> tuple[MaskedAutoencoder, Recipe]:
    """The encoder that a name means with the decoder that was trained with it.

    Args:
        name: `NAME@RUN`, the folder of a finished run (or its `encoder.safetensors`), or a model whose decoder comes
            with the package.

    Raises:
        ValueError: If there is no decoder.
    """
    architecture, _, weights = name.partition("@")
    try:
        if not weights:
            check_model_name(architecture)
            return open_embedded(architecture)
        file = weights_file(Path(weights))
        if file.name != "encoder.safetensors":
            raise FileNotFoundError("give a run's folder, or the encoder.safetensors in it")
        network, recipe = open_run(file.parent)
        if recipe.model != architecture:
            raise FileNotFoundError(f"the run trained {recipe.model}")
        return network, recipe
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot rebuild images, because it has no decoder: {error}") from error
