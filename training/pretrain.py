"""Pretrain an encoder on a folder or a tar of images.

A first look, a minute on any CPU (any folder of photographs will do):

    python training/pretrain.py mae --data photos/ --model vit_pico_patch8_pmae --out runs/try --steps 100

The recipe of the embedded weights, and MAE's ImageNet recipe on eight GPUs:

    python training/pretrain.py mae --data imagenette-128-train.tar --model vit_pico_patch8_pmae --out runs/pico
    torchrun --nproc-per-node 8 training/pretrain.py mae --data in1k/train --model vit_base_patch16_pmae --out runs/base

A killed run goes on with the same command and `--resume auto`, and ends with the same bits. A run folder holds
`recipe.json`, `metrics.jsonl`, `checkpoints/`, `grids/` and, at the end, `encoder.safetensors` and
`decoder.safetensors`.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import perceptual_mae_models  # noqa: F401  (registers the encoders in timm)
from perceptual_mae_models.features import check_model_name
from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource, RandomViews, create_loader
from training.data.sampler import DeterministicBatchSampler
from training.grids import FixedGrid
from training.networks.autoencoder import MaskedAutoencoder, build_autoencoder, init_mae_weights
from training.recipes import METHODS, Recipe
from training.run.checkpoint import CheckpointError, load_checkpoint
from training.run.folder import RunError, create_run_folder, find_checkpoint, versions
from training.run.record import Intervals, RunRecord
from training.run.seeding import derive_seed, generator
from training.step import NonFiniteGuard, generator_update
from training.weights import save_run_weights


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What changes the speed of a run and nothing else."""

    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    cache_images: bool = False
    """Keep decoded images in the memory of every loader process (4 bytes a pixel), for small data sets."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    compile: bool = False
    """torch.compile the network: faster steps after a slow first one; the result differs by float rounding only."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a run reads and writes."""

    data: Path
    """A folder of images (any nesting) or a .tar of them."""
    out: Path
    """The run folder."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the newest checkpoint in --out, or start afresh. no: refuse a folder that holds a run."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep; older ones are deleted."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    grid_every: int = 500
    """Steps between pictures of reconstructions; 0: none."""
    max_broken: float = 0.01
    """Stop when a larger share of the images seen did not decode."""

    def __post_init__(self) -> None:
        if self.keep_checkpoints < 1:
            raise ValueError(f"--keep-checkpoints is {self.keep_checkpoints}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole command."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    runtime: tyro.conf.OmitArgPrefixes[Runtime]
    output: tyro.conf.OmitArgPrefixes[Output]


@dataclass
class Learner:
    """What learns, and everything about it that a checkpoint must hold."""

    network: MaskedAutoencoder
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None

    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks by name."""
        return {"network": self.network, **({"ema": self.ema.module} if self.ema else {})}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers by name."""
        return {"optimizer": self.optimizer}

    @property
    def exported(self) -> MaskedAutoencoder:
        """The network that the run is for: the average where there is one."""
        return self.ema.module if self.ema else self.network


def create_learner(recipe: Recipe, device: torch.device) -> Learner:
    """Networks with the weights that the seed decides, and their optimiser.

    Raises:
        ValueError: If the recipe's model is unknown or cannot be pretrained.
    """
    check_model_name(recipe.model)
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    network = build_autoencoder(
        timm.create_model(recipe.model, pretrained=False, num_classes=0),
        decoder_dim=recipe.decoder_dim,
        decoder_depth=recipe.decoder_depth,
        decoder_heads=recipe.decoder_heads,
        mask_ratio=recipe.mask_ratio,
    )
    init_mae_weights(network)
    network.to(device)
    groups = param_groups_weight_decay(
        network, recipe.weight_decay, no_weight_decay_list=["encoder.cls_token", "decoder.mask_token"]
    )
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    return Learner(network, optimizer, ModelEmaV3(network, decay=recipe.ema_decay) if recipe.ema_decay else None)


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then a half-cosine to 0; the rate is a function of the step alone."""
    warmup_steps = round(recipe.warmup * total_steps)
    return CosineLRScheduler(
        optimizer, t_initial=total_steps - warmup_steps, warmup_t=warmup_steps, warmup_prefix=True, t_in_epochs=False
    )


def mask_noise(recipe: Recipe, step: int, num_patches: int) -> torch.Tensor:
    """The noise that decides the masks of a global batch: (batch_size, L) uniform, the same on every process."""
    return torch.rand(recipe.batch_size, num_patches, generator=generator(recipe.seed, "mask", step))


def pretrain(config: Config) -> None:
    """Run one command, from the recipe to the exported weights.

    Raises:
        RunError: If the run folder, the images or the loss do not allow to go on.
    """
    recipe, output = config.recipe, config.output
    # without cpu=True, accelerate takes the processes of a launcher on a machine without GPUs for single ones
    use_cpu = config.runtime.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision="no", cpu=use_cpu)
    source = ImageSource(output.data, cache=config.runtime.cache_images)
    learner = create_learner(recipe, accelerator.device)
    total_steps = recipe.num_steps(len(source))
    description = {
        "recipe": dataclasses.asdict(recipe),
        "data": {"name": output.data.name, "images": len(source)},
        "total_steps": total_steps,
        "versions": versions(),
    }
    checkpoint = find_checkpoint(output.out, description, resume=output.resume == "auto")
    accelerator.wait_for_everyone()  # nobody may find the folder that this very run creates
    if accelerator.is_main_process:
        create_run_folder(output.out, description)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "broken": 0}
    if checkpoint:
        progress = load_checkpoint(checkpoint, learner.modules(), learner.optimizers())
    progress = optimise(config, accelerator, source, learner, total_steps, progress)
    if accelerator.is_main_process:
        save_run_weights(output.out, learner.exported, recipe, progress)
    accelerator.end_training()


def optimise(
    config: Config,
    accelerator: Accelerator,
    source: ImageSource,
    learner: Learner,
    total_steps: int,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """The loop: batch, step, record; from `progress["step"]` to `total_steps`.

    Returns:
        The progress at the end.
    """
    recipe, output, network = config.recipe, config.output, learner.network
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    steps = range(progress["step"], total_steps)
    sampler = DeterministicBatchSampler(
        len(source), recipe.batch_size, steps, recipe.seed, rank=rank, world_size=world_size
    )
    views = RandomViews(source, network.image_size, recipe.crop_scale, recipe.seed)
    loader = create_loader(views, sampler, workers=config.runtime.workers)
    scheduler = create_scheduler(learner.optimizer, recipe, total_steps)
    model = accelerator.prepare_model(torch.compile(network) if config.runtime.compile else network)
    guard = NonFiniteGuard(torch.zeros((), device=device))
    grid = FixedGrid(source, network, recipe)
    record = RunRecord(
        output.out,
        accelerator,
        learner.modules(),
        learner.optimizers(),
        progress,
        total_steps=total_steps,
        batch_size=recipe.batch_size,
        intervals=Intervals(log=output.log_every, checkpoint=output.checkpoint_every, grid=output.grid_every),
        keep=output.keep_checkpoints,
        max_broken=output.max_broken,
        draw=lambda path: grid.save(learner.exported, path),
    )
    for step, batch in zip(steps, loader, strict=True):
        # what a network draws for itself (drop path) is the same after a restart and different on every process
        torch.manual_seed(derive_seed(recipe.seed, "network", step, rank))
        images = batch.images.to(device, non_blocking=True).float() / 255  # (N, 3, H, W) in [0, 1]
        noise = mask_noise(recipe, step, network.num_patches)[sampler.share].to(device)  # (N, L)
        scheduler.step_update(step)
        scalars = generator_update(model, network, learner.optimizer, guard, images, noise, recipe)
        if learner.ema:
            learner.ema.update(network)
        lr = learner.optimizer.param_groups[0]["lr"]
        record.after_step(scalars, lr, [source.name(index) for index in batch.broken])
    return record.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line (by default this process's) and run it."""
    # a method's defaults depend on the model, so the model is looked up before the real parser is built
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default="vit_base_patch16_pmae")
    model = peek.parse_known_args(argv)[0].model
    configs = {
        name: (
            (recipe.__doc__ or "").split("\n")[0],
            Config(recipe=recipe(model), runtime=Runtime(), output=Output(data=tyro.MISSING, out=tyro.MISSING)),
        )
        for name, recipe in METHODS.items()
    }
    try:
        pretrain(tyro.extras.overridable_config_cli(configs, args=argv))
    except (RunError, CheckpointError, ValueError, FileNotFoundError, ImageError) as error:
        raise SystemExit(f"pretrain.py: {error}") from error


if __name__ == "__main__":
    main()
