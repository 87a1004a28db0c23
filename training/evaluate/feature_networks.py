"""Networks that look at sets of images: what torch-fidelity's statistics are computed on."""

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import normalize, resize

from training.evaluate.models import open_model

DOWNLOAD = "download"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Digest of the file that torch-fidelity and pytorch-fid publish: the network of Heusel et al., converted."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network whose features and logits tell sets of images apart."""

    name: str
    """Empty for Inception as published."""
    module: nn.Module
    respond: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """(N, 3, H, W) uint8 on its device -> (N, D) features; (N, C) logits, if it has a classifier."""
    metrics: tuple[str, str, str] = ("fd", "kd", "score")
    """What its Frechet distance, kernel distance and score are called."""


def open_network(name: str, *, device: str, seed: int = 0) -> FeatureNetwork:
    """A timm network, which sees whole images at the size of its configuration, in float32.

    Its features are what its classifier reads; of one without a classifier, the mean of the patch tokens.

    Args:
        name: As in `training/evaluate/models.py`.
        device: Where it runs.
        seed: Decides random weights.

    Raises:
        ValueError: If the name means nothing.
        FileNotFoundError: If there is no such file of weights.
    """
    extractor, representations = open_model(name, device=device, seed=seed)
    model, config = extractor.model, extractor.model.pretrained_cfg
    interpolation = InterpolationMode.BILINEAR if config["interpolation"] == "bilinear" else InterpolationMode.BICUBIC

    @torch.no_grad()
    def respond(images: Tensor) -> tuple[Tensor, Tensor | None]:
        # not the extractor's transform: its crop would hide the borders
        images = resize(images, list(extractor.input_size), interpolation=interpolation, antialias=True)
        images = normalize(images.float() / 255, list(config["mean"]), list(config["std"]))
        if not getattr(model, "num_classes", 0):
            return extractor.encode(images)[:, representations["avg"]], None
        encoded = model.forward_features(images)
        return model.forward_head(encoded, pre_logits=True).flatten(1), model.forward_head(encoded)

    return FeatureNetwork(name=name, module=model, respond=respond)


def open_inception(weights: str, *, device: str) -> FeatureNetwork:
    """The Inception-v3 of FID, by torch-fidelity, with its resizing.

    Args:
        weights: A file, or "download".
        device: Where it runs.

    Returns:
        The network. With weights of another digest than the published file's it is one network among others, called
        inception@FILE, and its metrics are not called FID, KID and Inception Score.

    Raises:
        FileNotFoundError: If there is no such file, or it cannot be downloaded.
        ValueError: If it holds something else.
    """
    check_installed()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file = _download(URL_INCEPTION_V3) if weights == DOWNLOAD else Path(weights)
    if not file.is_file():
        raise FileNotFoundError(
            f"--reconstruction.inception {file}: no such file; {URL_INCEPTION_V3} is the one to give"
        )
    try:
        torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity itself would run code of the file
        inception = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise ValueError(
            f"--reconstruction.inception {file} is not {Path(URL_INCEPTION_V3).name} of torch-fidelity: {error}"
        ) from error
    inception.to(device)

    @torch.no_grad()
    def respond(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = inception(images)
        return features, logits

    if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
        return FeatureNetwork(name=f"inception@{file}", module=inception, respond=respond)
    return FeatureNetwork(name="", module=inception, respond=respond, metrics=("fid", "kid", "inception_score"))


def check_installed() -> None:
    """Refuse to go on without torch-fidelity.

    Raises:
        RuntimeError: If it is not installed.
    """
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise RuntimeError('distances of sets of images need torch-fidelity: pip install -e ".[evaluate]"') from error


def _download(url: str) -> Path:
    try:
        torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True, map_location="cpu", progress=False)
    except OSError as error:
        raise FileNotFoundError(
            f"{url} cannot be reached ({error}): fetch it elsewhere and give it by --reconstruction.inception FILE"
        ) from error
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
