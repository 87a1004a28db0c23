"""The timm encoder that a user's name means, built as something that learns needs it: with a head, at another size."""

from typing import Any

import timm
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from training.evaluate.models import PIXELS, RANDOM, open_model
from training.run.seeding import derive_seed, seeded


def is_random(name: str) -> bool:
    """Whether a name asks for random weights."""
    return name.partition("@")[2] == RANDOM


def build_encoder(name: str, *, seed: int = 0, img_size: tuple[int, int] | None = None, **build: Any) -> nn.Module:
    """A timm module with the weights that a name means.

    Args:
        name: See `training/evaluate/models.py`; not `pixels:`.
        seed: Decides random weights, those of a new head too.
        img_size: Height and width of the images in pixels, where it is not the configuration's; position embeddings
            are resampled.
        build: Arguments of `timm.create_model`: num_classes, global_pool, drop_path_rate, …

    Returns:
        The module on the CPU. With `global_pool="avg"` a ViT's final norm comes after pooling, as in MAE's
        fine-tuning, and starts as the norm it was.

    Raises:
        ValueError: If the name is of nothing that learns, or timm builds from these arguments what the weights do not
            fit.
    """
    if name.startswith(PIXELS):
        raise ValueError(f"{name} has no weights to train")
    extractor, _ = open_model(name, device="cpu", seed=seed)
    if not build.get("drop_path_rate"):
        build.pop("drop_path_rate", None)  # not every architecture knows it
    try:
        with seeded(derive_seed(seed, "head")):
            model: Any = timm.create_model(name.partition("@")[0], pretrained=False, **build)
    except TypeError as error:
        raise ValueError(f"timm cannot build {name} with {build}: {error}") from error
    trained_for = getattr(getattr(extractor.model, "patch_embed", None), "img_size", None)
    if trained_for and model.patch_embed.img_size != trained_for:
        model.set_input_size(img_size=trained_for)
    state = _fitted(extractor.model.state_dict(), model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    heads = tuple(f"{head}." for head in _names(model.pretrained_cfg.get("classifier")))
    if wrong := [key for key in (*missing, *unexpected) if not key.startswith(heads)]:
        raise ValueError(f"{name}: weights do not fit the model that timm builds with {build}: {', '.join(wrong[:5])}")
    if img_size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=img_size)
    model.pretrained_cfg = dict(extractor.model.pretrained_cfg)
    return model


def encoder_groups(encoder: Any, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """An optimiser's groups of an encoder's parameters that learn below new heads, which learn at the full rate.

    Args:
        encoder: A timm module without a head of its own.
        weight_decay: Of matrices.
        layer_decay: Factor of the learning rate from the heads to the last layer, and from each layer to the one below.
    """
    kept = encoder.no_weight_decay() if hasattr(encoder, "no_weight_decay") else ()
    groups = param_groups_layer_decay(encoder, weight_decay, kept, layer_decay=layer_decay)
    # timm takes the last layer for a head
    return [{**group, "lr_scale": group["lr_scale"] * layer_decay} for group in groups]


def _names(classifier: Any) -> tuple[str, ...]:
    if not classifier:
        return ("head", "fc")
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _fitted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A state for `model`: without a head, the norm under the name it has there."""
    heads = tuple(f"{head}." for head in _names(model.pretrained_cfg.get("classifier")))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    wanted = model.state_dict()
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{new}weight" in wanted and f"{new}weight" not in state:
            state = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in state.items()}
    return state
