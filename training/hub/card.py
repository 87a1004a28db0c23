"""The model card of a tag: Markdown with the Hub's metadata, made of the run's own JSON and timm's facts."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import PretrainedCfg

from perceptual_mae_models.hub import HUB_ORGANISATION
from training.cost import IMAGENET_IMAGES
from training.recipes import METHODS as RECIPES

METHODS = {
    "mae": "a masked autoencoder: it hides patches of an image and learns to rebuild them by squared error",
    "ms_ssim": "a masked autoencoder that learns to rebuild whole images by structural similarity and L1",
    "ls_gan_p": (
        "a masked autoencoder that rebuilds whole images under L1, the features of a discriminator that learns beside"
        " it, and a least-squares adversary"
    ),
    "msg_gan_p": (
        "a masked autoencoder that rebuilds images at several scales under L1, the features of a multi-scale"
        " discriminator that learns beside it, and a least-squares adversary"
    ),
    "stylegan2_ada_p": (
        "a masked autoencoder that rebuilds images at several scales under L1, the features of a multi-scale"
        " discriminator that learns beside it, and StyleGAN2's adversary with adaptive augmentation"
    ),
}
DATASETS = {
    "in1k": ("ImageNet-1K", "ILSVRC/imagenet-1k", IMAGENET_IMAGES),
    "imagenette": ("Imagenette", "frgfm/imagenette", 9_469),
}
"""What the end of a registered tag says of the training images: title, id on the Hub, how many there are."""
LABELS = {
    "knn": "k-NN (weighted, {setting}), accuracy",
    "linear": "linear probe, accuracy",
    "few_shot": "logistic regression on {amount}, accuracy",
    "finetune": "fine-tuned, accuracy",
}
KINDS = ("reconstruction", "loss_on", "norm_pix_loss", "adversarial_loss", "phi", "ada_target", "paste_visible")
"""Fields of a recipe that decide which terms there are."""
CITATIONS = """```bibtex
@inproceedings{tukra2023improving,
  title     = {Improving Visual Representation Learning through Perceptual Understanding},
  author    = {Tukra, Samyakh and Hoffman, Frederick and Chatfield, Ken},
  booktitle = {CVPR},
  year      = {2023}
}
@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {CVPR},
  year      = {2022}
}
```
"""


def write_card(cfg: PretrainedCfg, config: Mapping[str, Any], provenance: Mapping[str, Any] | None) -> str:
    """A tag's model card.

    Args:
        cfg: timm's facts of it.
        config: Its `config.json`.
        provenance: What `training/export.py` recorded, the title of the images included where the tag is not one of
            ours; None for a tag without weights.

    Returns:
        Markdown; every figure in it is one of `provenance`, and is not there without it.
    """
    name = f"{cfg.architecture}.{cfg.tag}"
    method, _, data = str(cfg.tag).rpartition("_")
    title, dataset = DATASETS[data][:2] if data in DATASETS else (None, None)
    learned = METHODS.get(method, "")
    if provenance:
        method = provenance["recipe"]["method"]
        learned = describe_method(provenance["recipe"])
        if own := provenance["data"].get("title"):
            title, dataset = own, None
    size = f"{cfg.input_size[1]} x {cfg.input_size[2]}"
    metadata = ModelCardData(
        license=cfg.license,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "transformers", "vit", "masked-autoencoder", "self-supervised", "perceptual-mae"],
        datasets=[dataset] if dataset else None,
        model_name=name if provenance else None,
        eval_results=list(list_results(provenance)) or None if provenance else None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A ViT encoder ({config['num_features']} features, {size} images) pretrained without labels on {title} as"
        f" {learned}. It gives image features and a backbone; it has no class head.\n",
    ]
    if provenance is None:
        parts.append(
            "**Recipe only.** No weights have been trained under this tag and published. This page describes what a"
            f" repository of it will hold; `python training/pretrain.py {method} --model {cfg.architecture} --data DIR"
            " --out RUN` trains them.\n"
        )
    parts += [
        *describe_use(cfg, config, trained=provenance is not None),
        *describe_training(provenance),
        *describe_results(provenance),
    ]
    parts += [*describe_limits(cfg, provenance), "## Citation\n", CITATIONS]
    return "\n".join(parts)


def describe_method(recipe: Mapping[str, Any]) -> str:
    """What a run's encoder learned by; where the run changed its method's terms, no more than that."""
    method = recipe["method"]
    usual = dataclasses.asdict(RECIPES[method](recipe["model"]))
    same = all(recipe.get(key, usual.get(key)) == usual.get(key) for key in KINDS)
    same &= all(bool(recipe.get(key)) == bool(usual.get(key)) for key in ("feature_weight", "adversarial_weight"))
    if same and method in METHODS:
        return METHODS[method]
    return f"a masked autoencoder, trained by a variant of the method `{method}`: `recipe.json` says which"


def describe_use(cfg: PretrainedCfg, config: Mapping[str, Any], *, trained: bool) -> Iterator[str]:
    """Snippets, which tests run on the repositories that have weights."""
    name, repository = f"{cfg.architecture}.{cfg.tag}", cfg.hf_hub_id
    side = cfg.input_size[1]
    yield "## Use\n"
    yield "With timm alone:\n" if trained else "With timm alone, once there are weights:\n"
    yield f"""```python
import timm
import torch
from PIL import Image

model = timm.create_model("hf-hub:{repository}", pretrained=True)
model.eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.new("RGB", (320, 240))  # yours
with torch.inference_mode():
    features = model(transform(image).unsqueeze(0))  # (1, {config["num_features"]}), the class token
    tokens = model.forward_features(transform(image).unsqueeze(0))  # (1, 1 + {_patches(cfg)}, {config["num_features"]})
```
"""
    if repository == f"{HUB_ORGANISATION}/{name}":
        yield "With `perceptual_mae_models`, which also checks the file's digest:\n"
        yield f"""```python
import timm
import perceptual_mae_models

model = timm.create_model("{name}", pretrained=True)
extractor = perceptual_mae_models.FeatureExtractor("{name}", pool="avg")
```
"""
    else:
        yield "With `perceptual_mae_models`, features of files, PIL images or arrays:\n"
        yield f"""```python
import perceptual_mae_models

extractor = perceptual_mae_models.FeatureExtractor("hf-hub:{repository}", pool="avg")
```
"""
    yield (
        f"Images are resized to {math.floor(side / cfg.crop_pct)} pixels ({cfg.interpolation}), cropped to"
        f" {side} x {side}, and"
        ' standardised with ImageNet\'s mean and deviation. The mean of patch tokens (`pool="avg"`) or class token and'
        " mean together (`cls+avg`) usually serve better than the class token, which nothing was trained on.\n"
    )


def describe_training(provenance: Mapping[str, Any] | None) -> Iterator[str]:
    """Data, recipe and cost of the run."""
    if provenance is None:
        return
    recipe, data, cost = provenance["recipe"], provenance["data"], provenance["cost"]
    hours = cost["seconds"] / 3600
    yield "## Training\n"
    amount = "a stream of images" if data["images"] is None else f"{data['images']:,} images"
    yield f"- Data: {amount}, {data['terms']}."
    images = data["images"]
    length = f"{recipe['epochs']:g} epochs" if recipe.get("steps") is None else f"{recipe['steps']:,} steps"
    if recipe.get("steps") is not None and images:
        length += f" ({recipe['steps'] * recipe['batch_size'] / images:.3g} times all images)"
    yield (
        f"- Recipe: `{recipe['method']}`, {length}, batch {recipe['batch_size']}, base learning rate"
        f" {recipe['blr']:g} per 256 images, mask ratio {recipe['mask_ratio']:g}, seed {recipe['seed']}; all of it in"
        " `recipe.json`."
    )
    if recipe.get("init"):
        yield f"- The encoder began with the weights of `{Path(recipe['init']).name}`, whose terms go with these."
    yield (
        f"- Cost: {cost['steps']:,} steps in {hours:.1f} hours, what was measured on the way included, on"
        f" {cost['hardware']}."
    )
    versions = ", ".join(f"{key} {value}" for key, value in provenance["versions"].items())
    yield f"- Software: {versions}.\n"


def describe_results(provenance: Mapping[str, Any] | None) -> Iterator[str]:
    """A table of figures with 95 % intervals."""
    if not provenance or not provenance["results"]:
        return
    yield "## Results\n"
    yield (
        "Frozen features unless it says otherwise; brackets are 95 % intervals over the test images, of logistic"
        " regression over the draws of training images.\n"
    )
    yield "| images | judged by | % |\n| --- | --- | --- |"
    for row in provenance["results"]:
        value = row["value"]
        label = describe_protocol(row)
        interval = f"{100 * value['mean']:.1f}"
        if value["low"] < value["high"]:  # none where all draws are the same images
            interval += f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
        yield f"| {row['images']} | {label}, {row['features'] or 'whole model'} | {interval} |"
    yield ""
    if note := provenance.get("note"):
        yield f"{note}\n"


def describe_limits(cfg: PretrainedCfg, provenance: Mapping[str, Any] | None) -> Iterator[str]:
    """What the weights are not for, and their terms."""
    yield "## Limits and licence\n"
    images = provenance and provenance["data"]["images"]
    if images and images < 100_000:
        yield (
            f"- Pretrained on {images:,} images: a small encoder for demonstrations, tests and"
            " comparisons. Encoders that saw millions of images give much better features."
        )
    own = provenance and provenance["data"].get("title")  # images of which nobody here knows that
    known = "" if own else " Nothing was filtered or balanced."
    yield f"- Features carry the biases of the images they were learned from.{known}"
    yield "- No class head: train one, or compare features."
    yield f"- Weights: {cfg.license}. Terms of the training images are those of their owners.\n"


def list_results(provenance: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Accuracies in the Hub's own form."""
    for row in provenance["results"]:
        yield EvalResult(
            task_type="image-classification",
            dataset_type=row["images"].partition(" ")[0],
            dataset_name=row["images"],
            metric_type="accuracy",
            metric_name=f"{describe_protocol(row)}, {row['features'] or 'whole model'}",
            metric_value=round(100 * row["value"]["mean"], 2),
        )


def describe_protocol(row: Mapping[str, Any]) -> str:
    """How a figure was come by."""
    setting = row["setting"]
    amount = f"{setting} of the labels" if setting.endswith("%") else f"{setting} images a class"
    return LABELS[row["protocol"]].format(setting=setting, amount=amount)


def _patches(cfg: PretrainedCfg) -> int:
    patch = int(str(cfg.architecture).partition("_patch")[2].partition("_")[0])
    return (cfg.input_size[1] // patch) ** 2
