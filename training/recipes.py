"""Recipes: everything that changes the result of a pretraining run, as data.

A recipe is a frozen dataclass; the function named after a method returns the recipe of that method for a model. What
must not change the result (workers, micro-batches, logging) is in `training/pretrain.py`.

The values for ImageNet encoders are those of the paper and its release, filled up with MAE's published recipe and with
each technique's own paper; `training/README.md` lists the source of each.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import Suppress

from training.run.schedule import steps_of
from training.settings import Checks, refuse


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pretraining run, up to the images."""

    method: Annotated[str, Suppress]
    """Name of the recipe; set by the subcommand."""
    model: str = "vit_base_patch16_pmae"
    """Encoder to pretrain, an architecture name of `pmae list`."""
    init: str | None = None
    """Weights that the encoder begins with: a tag of `pmae list`, a file or a run's folder, resampled where they are
    for images of another size. None: random ones; the decoder begins with random ones in any case."""
    img_size: int | None = None
    """Height and width in pixels of the crops that the encoder learns from, a multiple of its patches' size (of four
    times that for several scales, whose discriminator halves its maps as long as it can). None: what the model is
    registered with."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder, in (0, 1)."""

    reconstruction: Literal["l1", "l2", "ssim_l1", "ms_ssim"] = "l2"
    """Distance between prediction and image. l1, l2: of standardised pixels; ssim_l1: the release's 0.85 SSIM + 0.15 L1
    over four scales; ms_ssim: 1 - MS-SSIM."""
    loss_on: Literal["hidden", "image"] = "hidden"
    """Where l1 and l2 count: on the hidden patches or on the whole image. The SSIM losses need the whole image."""
    norm_pix_loss: bool = True
    """Compare patches brought to zero mean and unit variance (better features) instead of plain pixels; l1 and l2 of
    one scale only. A discriminator then sees predictions with the mean and variance of the photograph's patches."""
    multi_scale: bool = False
    """Decoder with skips from the encoder and an image at every scale, instead of MAE's plain one."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Transformer blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""

    epochs: float = 300
    """Passes over the images. Ignored where --steps is given."""
    steps: int | None = None
    """Optimiser steps; instead of --epochs."""
    batch_size: int = 4096
    """Images a step, over all processes and micro-batches together."""
    blr: float = 1.5e-4
    """Base learning rate: that of 256 images a step; the peak rate is blr * batch_size / 256."""
    warmup: float = 40 / 300
    """Share of the run in which the learning rates rise from 0 to their peak; a half-cosine to 0 follows."""
    weight_decay: float = 0.05
    """AdamW weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW momenta."""
    clip_grad: float | None = None
    """Largest gradient norm of the autoencoder; larger gradients are scaled down to it. None: no limit."""
    ema_decay: float | None = None
    """Decay a step of an exponential moving average of the weights, which is then exported. None: no average."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast with losses in float32. fp32: everything in float32, for processors without bf16 units."""
    seed: int = 0
    """Decides the initial weights, the order of the images, the crops, the masks and every other draw."""

    def __post_init__(self) -> None:
        refuse(self, self._checks())

    def _checks(self) -> Checks:
        """For each field that can be wrong: whether it is right, and what it must be."""
        pixels = self.reconstruction in ("l1", "l2")
        return {
            "img_size": (self.img_size is None or self.img_size > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers of at least 0 and below 1"),
            "mask_ratio": (0 < self.mask_ratio < 1, "between 0 and 1"),
            "loss_on": (pixels or self.loss_on == "image", f"image for --reconstruction {self.reconstruction}"),
            "norm_pix_loss": (
                not self.norm_pix_loss or (pixels and not self.multi_scale),
                "off (--no-norm-pix-loss) for SSIM and for several scales",
            ),
            "epochs": (self.epochs > 0, "above 0"),
            "steps": (self.steps is None or self.steps > 0, "above 0"),
            "batch_size": (self.batch_size > 0, "above 0"),
            "blr": (self.blr > 0, "above 0"),
            "warmup": (0 <= self.warmup < 1, "at least 0 and below 1"),
            "clip_grad": (self.clip_grad is None or self.clip_grad > 0, "above 0"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"),
            "crop_scale": (0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "two ascending numbers in (0, 1]"),
            "decoder_depth": (self.decoder_depth > 0, "above 0"),
            "decoder_heads": (self.decoder_heads > 0, "above 0"),
            "decoder_dim": (
                self.decoder_dim > 0 and self.decoder_dim % 4 == self.decoder_dim % max(1, self.decoder_heads) == 0,
                "a multiple of 4 and of --decoder-heads",
            ),
        }

    @property
    def lr(self) -> float:
        """The peak learning rate, by MAE's linear scaling rule."""
        return self.blr * self.batch_size / 256

    def num_steps(self, num_images: int | None) -> int:
        """Optimiser steps of the whole run over a data set of `num_images`.

        Raises:
            ValueError: If neither the steps nor the size of the data set are known.
        """
        if self.steps is not None:
            return self.steps
        return steps_of("--epochs", self.epochs, num_images, self.batch_size, way_out="--steps")

    def check_data(self, num_images: int | None) -> None:
        """Refuse data over which the run cannot be scheduled.

        Raises:
            ValueError: If all steps are warm-up, a step would take images twice, or epochs cannot be counted.
        """
        total_steps = self.num_steps(num_images)
        if num_images is not None and self.batch_size > num_images:
            raise ValueError(
                f"--batch-size {self.batch_size} is more than there are images, {num_images}: give a smaller one"
            )
        if round(self.warmup * total_steps) >= total_steps:
            raise ValueError(f"--warmup {self.warmup:g}: none of the {total_steps} steps comes after it")
        self.phi_steps(num_images)

    def phi_steps(self, num_images: int | None) -> int:
        """Steps between renewals of phi's snapshot; 0: there is none.

        Raises:
            ValueError: If the size of the data set is not known.
        """
        return 0


@dataclass(frozen=True, kw_only=True)
class AdversarialRecipe(Recipe):
    """A run in which a discriminator learns beside the autoencoder and lends it its features (the paper's phi)."""

    adversarial_loss: Literal["least_squares", "logistic", "hinge", "wgan_gp"] = "least_squares"
    """The two players' losses on the discriminator's logits."""
    adversarial_weight: float = 0.7
    """w_adv: weight of the autoencoder's adversarial loss."""
    adaptive_weight: bool = False
    """Multiply w_adv by the ratio of the two losses' gradients at the decoder's last layer (taming-transformers). With
    --compile this takes the autoencoder's whole backward pass twice more; without, next to nothing."""
    adversarial_start: int = 0
    """Steps before the discriminator starts; until then only the reconstruction is learned, at every scale."""
    feature_weight: float = 0.05
    """d_f: weight of the distance between phi's features of prediction and image."""
    style_weight: float = 40.0
    """d_s: weight of the distance between the Gram matrices of those features."""
    phi: str = "discriminator"
    """Where features come from. discriminator: the live one; snapshot: a frozen copy of it, renewed every --phi-refresh
    epochs; timm:NAME: any pretrained timm model, such as timm:vgg16.tv_in1k."""
    phi_refresh: float = 1.0
    """Epochs between renewals of the snapshot."""
    phi_file: str | None = None
    """Local weights for phi = timm:NAME, instead of the Hub's."""
    paste_visible: bool = False
    """Show the discriminator and phi the photograph's own visible patches beside the rebuilt hidden ones, so that all
    they teach is about what was hidden. Ours, not the paper's."""

    d_width: int = 64
    """Width of the discriminator: channels of the first stage (one scale), or channels times resolution (multi-scale).
    It decides most of the step's cost: see --dry-run."""
    d_lr: float = 2e-3
    """The discriminator's peak learning rate (equalised learning rate: 10 times a plain network's)."""
    d_betas: tuple[float, float] = (0.0, 0.99)
    """The discriminator's Adam momenta."""
    d_clip_grad: float | None = None
    """Largest gradient norm of the discriminator. None: no limit."""

    r1_gamma: float = 0.0
    """Strength of the R1 penalty on real images; 0: none."""
    r1_every: int = 16
    """Steps between R1 penalties; each counts that many times."""
    path_weight: float = 0.0
    """Weight of the path-length penalty on the decoder; 0: none."""
    path_every: int = 4
    """Steps between path-length penalties; each counts that many times."""
    path_decay: float = 0.01
    """Share of a new mean path length in its running mean."""
    path_to_encoder: bool = False
    """Let the path-length penalty reach the encoder too; off: a regulariser of the decoder alone."""
    ada_target: float | None = None
    """Adaptive augmentation steers E[sign(D(real))] to this; None: no augmentation."""
    ada_images: int = 500_000
    """Images in which the augmentation's probability can rise from 0 to 1."""

    def phi_steps(self, num_images: int | None) -> int:
        """See `Recipe.phi_steps`."""
        if self.phi != "snapshot":
            return 0
        return steps_of("--phi-refresh", self.phi_refresh, num_images, self.batch_size, way_out="--epoch-images")

    def _checks(self) -> Checks:
        phi_is_known = self.phi in ("discriminator", "snapshot") or self.phi.startswith("timm:")
        at_least_zero = ("adversarial_weight", "feature_weight", "style_weight", "r1_gamma")
        above_zero = ("d_lr", "r1_every", "path_every", "phi_refresh", "ada_images")
        widths = (128, math.inf) if self.multi_scale else (1, 1024)  # values outside are of the other kind's unit
        return {
            **super()._checks(),
            **{name: (getattr(self, name) >= 0, "at least 0") for name in (*at_least_zero, "adversarial_start")},
            **{name: (getattr(self, name) > 0, "above 0") for name in above_zero},
            "phi": (phi_is_known, "discriminator, snapshot or timm:NAME"),
            "phi_file": (self.phi_file is None or self.phi.startswith("timm:"), "given with --phi timm:NAME only"),
            "path_weight": (
                self.path_weight == 0 or (self.path_weight > 0 and not self.norm_pix_loss),
                "at least 0, and 0 with --norm-pix-loss",
            ),
            "d_clip_grad": (self.d_clip_grad is None or self.d_clip_grad > 0, "above 0"),
            "path_decay": (0 < self.path_decay <= 1, "above 0 and at most 1"),
            "d_width": (
                widths[0] <= self.d_width <= widths[1],
                "channels times resolution, at least 128, for several scales, and channels, at most 1024, for one",
            ),
            "d_betas": (all(0 <= beta < 1 for beta in self.d_betas), "two numbers of at least 0 and below 1"),
            "ada_target": (
                self.ada_target is None or (-1 < self.ada_target < 1 and self.adversarial_loss != "wgan_gp"),
                "between -1 and 1, and none with --adversarial-loss wgan_gp, whose logits have no zero",
            ),
        }


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def recipe_from_json(values: dict[str, Any]) -> Recipe:
    """The recipe that a run saved; fields that came later keep what they did before they were fields.

    Raises:
        TypeError: If a field is unknown.
    """
    adversarial_names = {field.name for field in fields(AdversarialRecipe)} - {field.name for field in fields(Recipe)}
    kind = AdversarialRecipe if adversarial_names & values.keys() else Recipe
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**arguments)


def _fit_pico(recipe: AnyRecipe) -> AnyRecipe:
    """Scale a recipe to the embedded encoder: a light decoder, small batches, two CPU cores without bf16 units."""
    return replace(
        recipe,
        decoder_dim=128,
        decoder_depth=4 if recipe.multi_scale else 2,
        decoder_heads=4,
        epochs=100,
        batch_size=128,
        blr=2e-3,
        warmup=0.05,
        precision="fp32",
    )


def mae(model: str) -> Recipe:
    """Masked autoencoder: squared error of the hidden patches.

    MAE's published recipe (appendix A.1) over the 300 epochs of Perceptual MAE.
    """
    recipe = Recipe(method="mae", model=model)
    return _fit_pico(recipe) if model.startswith("vit_pico") else recipe


def ms_ssim(model: str) -> Recipe:
    """Structural similarity and L1 of the whole image over four scales, no discriminator."""
    return replace(mae(model), method="ms_ssim", reconstruction="ssim_l1", loss_on="image", norm_pix_loss=False)


def ls_gan_p(model: str) -> AdversarialRecipe:
    """L1 of the whole image, features and style of a single-scale discriminator, least-squares adversary."""
    recipe = AdversarialRecipe(
        method="ls_gan_p", model=model, reconstruction="l1", loss_on="image", norm_pix_loss=False
    )
    return replace(_fit_pico(recipe), d_width=32) if model.startswith("vit_pico") else recipe


def msg_gan_p(model: str) -> AdversarialRecipe:
    """As ls_gan_p, with multi-scale gradients: an image at every scale of the decoder, judged at that scale."""
    recipe = replace(ls_gan_p(model), method="msg_gan_p", multi_scale=True, d_width=6144)
    return replace(_fit_pico(recipe), d_width=512) if model.startswith("vit_pico") else recipe


def stylegan2_ada_p(model: str) -> AdversarialRecipe:
    """As msg_gan_p, with StyleGAN2's adversary: logistic loss, R1, path length, adaptive augmentation."""
    return replace(
        msg_gan_p(model),
        method="stylegan2_ada_p",
        adversarial_loss="logistic",
        r1_gamma=10.0,
        path_weight=2.0,
        ada_target=0.6,
    )


def debug(model: str) -> AdversarialRecipe:
    """`stylegan2_ada_p` in small, within seconds: to try an installation or a data set, not to learn anything."""
    return replace(
        stylegan2_ada_p("vit_pico_patch8_pmae" if model == Recipe.model else model),
        method="debug",
        steps=8,
        batch_size=8,
        decoder_dim=32,
        decoder_heads=2,
        d_width=256,
        r1_every=2,
        path_every=2,
        precision="fp32",
    )


METHODS = {
    "mae": mae,
    "ms_ssim": ms_ssim,
    "ls_gan_p": ls_gan_p,
    "msg_gan_p": msg_gan_p,
    "stylegan2_ada_p": stylegan2_ada_p,
    "debug": debug,
}
