"""Fine-tuning: the whole encoder learns the labels.

By MAE's published recipe (He et al. 2022, appendix A.1, and the values of its repository), through timm's augmentation,
mixing, layer decay and drop path.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from perceptual_mae_models.convert import save_weights
from perceptual_mae_models.images import ImageError
from perceptual_mae_models.weights import describe_size
from training.data.images import ImageSource
from training.data.sampler import ImageKey
from training.evaluate.encoders import build_encoder
from training.evaluate.features import cut, fingerprint_data, fingerprint_weights, load_views
from training.evaluate.finetune_recipe import FineTuneRecipe, FineTuneSettings, check_batch, resolve_recipe
from training.evaluate.intervals import share_interval
from training.evaluate.rows import Place, Row
from training.evaluate.trainer import Schedule, Task, fit, run_name
from training.run.engine import count_processes
from training.run.seeding import derive_seed, seeded

CLASSIFIER = "classifier.safetensors"
"""In a run's folder, when it has ended."""
CUT = ("processes", "micro_batches")
"""What a recipe says of how batches were cut, where that decides what is drawn."""


class LabelledViews(Dataset[Any]):
    """(key, augmented image, label), drawn from seed, epoch and image alone.

    Args:
        source: Labelled images.
        transform: From an RGB image to a tensor, drawing from the global generators.
        seed: The run's seed.
    """

    def __init__(self, source: ImageSource, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.labels = source.labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: ImageKey) -> tuple[ImageKey, Tensor, int] | ImageError:
        try:
            image = self.source.load(key.image)
        except ImageError as error:
            return error
        with seeded(derive_seed(self.seed, "view", *key)):
            return key, self.transform(image), self.labels[key.image]


class Mix:
    """Collates views and mixes pairs of them, drawn from the seed and the batch's first view.

    Pairs are made inside a pass, as MAE does: other numbers of processes or micro-batches make other pairs.

    Args:
        recipe: How to mix.
        num_classes: Of the labels.
    """

    def __init__(self, recipe: FineTuneRecipe, num_classes: int) -> None:
        self.seed = recipe.seed
        self.mix = (
            Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
            if recipe.mixes
            else None
        )

    def __call__(self, items: list[tuple[ImageKey, Tensor, int]]) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) images with (N,) labels, or with (N, C) shares of labels where they are mixed."""
        images, labels = default_collate([(image, label) for _, image, label in items])
        if not self.mix:
            return images, labels
        # timm mixes targets on the images' device and takes batches of even size only
        with seeded(derive_seed(self.seed, "mix", *items[0][0])):
            mixed: tuple[Tensor, Tensor] = self.mix(images, labels)
        return mixed


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """As timm, and to 0 bits too: policies reach them at full strength, and Pillow 13 refuses what was black before."""
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


def create_augmentation(config: dict[str, Any], recipe: FineTuneRecipe) -> Any:
    """A recipe's augmentation, by timm: from an RGB image to a tensor (3, H, W), normalised as the model wants it."""
    transform = create_transform(
        input_size=config["input_size"],
        is_training=True,
        color_jitter=0.0,
        auto_augment=recipe.augment or None,
        interpolation="bicubic",
        re_prob=recipe.random_erase,
        re_mode="pixel",
        mean=config["mean"],
        std=config["std"],
    )
    for policy in transform.transforms:
        # operations of RandAugment and AugMix, or AutoAugment's pairs of them
        for operation in (*getattr(policy, "ops", ()), *chain(*getattr(policy, "policy", ()))):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def create_task(name: str, source: ImageSource, recipe: FineTuneRecipe) -> Task:
    """What fine-tuning learns.

    Args:
        name: See `training/evaluate/models.py`.
        source: Labelled training images.
        recipe: How.
    """
    network: Any = build_encoder(
        name,
        seed=recipe.seed,
        num_classes=len(source.classes),
        drop_path_rate=recipe.drop_path,
        global_pool="avg",
    )
    head = network.get_classifier()
    if isinstance(head, nn.Linear):
        with seeded(derive_seed(recipe.seed, "head")):
            nn.init.trunc_normal_(head.weight, std=2e-5)  # MAE's: the first gradients hardly reach the encoder
    transform = create_augmentation(resolve_model_data_config(network), recipe)
    optimizer = create_optimizer_v2(
        network,
        opt="adamw",
        lr=recipe.blr * recipe.batch_size / 256,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        betas=(0.9, 0.999),
        fused=True,
    )
    collate = Mix(recipe, len(source.classes))
    loss = SoftTargetCrossEntropy() if collate.mix else LabelSmoothingCrossEntropy(recipe.smoothing)

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": loss(model(batch[0]).float(), batch[1])}

    views = LabelledViews(source, transform, recipe.seed)
    return Task(network, optimizer, views, losses, collate, multiple=2 if collate.mix else 1)


@torch.inference_mode()
def classify(network: nn.Module, source: ImageSource, place: Place) -> Tensor:
    """Logits of every image of a source through the model's own transform: (N, C) float32 on the CPU.

    Raises:
        ImageError: At an image that does not decode.
    """
    transform = create_transform(**resolve_model_data_config(network))
    batches = load_views(source, transform, cut(range(len(source)), place.batch_size), place.engine.workers)
    device = next(network.parameters()).device
    return torch.cat([network(images.to(device)).float().cpu() for images in batches])


def save_classifier(out: Path, network: Any, classes: list[str]) -> None:
    """Write `classifier.safetensors`, and of an encoder that has no head by itself `encoder.safetensors`."""
    size = describe_size(network)
    save_weights(out / CLASSIFIER, network.state_dict(), {"classes": json.dumps(classes), **size})
    if network.pretrained_cfg.get("num_classes") == 0:
        state = {key: value for key, value in network.state_dict().items() if not key.startswith("head.")}
        state = {key.replace("fc_norm.", "norm.", 1): value for key, value in state.items()}
        save_weights(out / "encoder.safetensors", state, size)


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning made."""

    network: nn.Module
    """In evaluation mode on its device."""
    classes: list[str]
    """Names, by output."""
    recipe: FineTuneRecipe
    seconds: float
    run: str
    """The run folder, below the evaluation's."""


def fine_tune(name: str, train: ImageSource, settings: FineTuneSettings, seed: int, place: Place) -> FineTuned:
    """Fine-tune a model, or go on with it where a killed command stopped.

    The run folder below `place.out / "runs"` keeps checkpoints and metrics, and at the end `classifier.safetensors`
    (the timm model with `num_classes` and `global_pool="avg"`) and, of architectures that have no head by themselves,
    `encoder.safetensors`, whose final norm comes before pooling again.

    Raises:
        ValueError: If the batch cannot be cut as it should, or the model cannot learn.
        RunError: If a loss is not finite.
        ImageError: At an image that does not decode.
        Interrupted: If a signal asked to stop.
    """
    recipe = resolve_recipe(name, settings, seed)
    check_batch(recipe, len(train))
    task = create_task(name, train, recipe)
    steps = max(1, round(recipe.epochs * len(train) / recipe.batch_size))
    schedule = Schedule(
        steps=steps,
        warmup_steps=round(steps * min(0.5, recipe.warmup_epochs / recipe.epochs)),
        batch_size=recipe.batch_size,
        clip_grad=recipe.clip_grad,
        ema_decay=recipe.ema_decay,
        precision=recipe.precision,
        seed=seed,
    )
    description = {
        "recipe": {"model": name, **dataclasses.asdict(recipe)},
        "data": {"train": fingerprint_data(train), "weights": fingerprint_weights(task.network)},
    }
    if recipe.mixes or recipe.drop_path:
        # pairs and dropped branches are drawn inside a pass, so another cut is another run
        description["recipe"] |= {"processes": count_processes(), "micro_batches": place.engine.micro_batches}
    out = place.out / "runs" / run_name("finetune", description)
    if "processes" in description["recipe"] and count_processes() == 1 and not (out / CLASSIFIER).exists():
        out, description = find_finished(out, description)
    network, seconds = fit(task, schedule, description, out, place.engine)
    if PartialState().is_main_process:
        save_classifier(out, network, train.classes)
    return FineTuned(network, train.classes, recipe, seconds, str(out.relative_to(place.out)))


def find_finished(out: Path, description: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """For one process the run that ended by the same recipe on several, if there is one.

    `shift` and a second look run in one process, on what several have learned.

    Args:
        out: The run's own folder.
        description: Its own.

    Returns:
        Folder and description of the other run, or its own.
    """

    def learned(told: dict[str, Any]) -> dict[str, Any]:
        return {**told, "recipe": {key: value for key, value in told["recipe"].items() if key not in CUT}}

    own = learned(json.loads(json.dumps(description)))
    for file in sorted(out.parent.glob("finetune-*/recipe.json")):
        other = json.loads(file.read_text())
        if {key: learned(other)[key] for key in own} != own or other["recipe"]["processes"] == 1:
            continue
        if (file.parent / CLASSIFIER).exists():
            return file.parent, {key: other[key] for key in description}
        print(f"{file.parent} was begun with {describe_cut(other)}: so many go on with it", file=sys.stderr)
    return out, description


def describe_cut(description: dict[str, Any]) -> str:
    """How a run cuts its batches."""
    return ", ".join(f"{description['recipe'][key]} {key.replace('_', ' ')}" for key in CUT)


def run_finetune(tuned: FineTuned, test: ImageSource, place: Place) -> Iterator[Row]:
    """Accuracy of a fine-tuned model on `test`."""
    if test.classes != tuned.classes:
        raise ValueError(f"{test.spec} has other classes than were learned: {test.classes[:5]}, {tuned.classes[:5]}")
    right = classify(tuned.network, test, place).argmax(dim=1) == torch.tensor(test.labels)
    yield Row(
        protocol="finetune",
        setting=f"{tuned.recipe.epochs:g} epochs",
        metric="accuracy",
        value=share_interval(right),
        seconds=tuned.seconds,
        detail={"recipe": dataclasses.asdict(tuned.recipe), "run": tuned.run},
    )
