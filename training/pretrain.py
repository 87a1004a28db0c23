"""Pretrain an encoder on images, by any of the methods of `training/recipes.py`.

A first look, a minute on any CPU (any folder of photographs will do):

    python training/pretrain.py mae --data photos/ --model vit_pico_patch8_pmae --out runs/try --steps 100

The recipe of the embedded weights, and the paper's best method for ImageNet on eight GPUs, or on two such machines:

    python training/pretrain.py mae --data imagenette-128-train.tar --model vit_pico_patch8_pmae --out runs/pico
    torchrun --nproc-per-node 8 training/pretrain.py stylegan2_ada_p --data in1k/train --out runs/base --micro-batches 4
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 training/pretrain.py …

`--dry-run` says what a command would do and cost. A killed run goes on with the same command and `--resume auto`, and
ends with the same bits. A run folder holds `recipe.json`, `metrics.jsonl`, `checkpoints/`, `grids/` and, at the end,
`curves.png`, `encoder.safetensors` and `decoder.safetensors`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from timm.scheduler import CosineLRScheduler

import perceptual_mae_models  # noqa: F401  (registers the encoders in timm)
from perceptual_mae_models.images import ImageError
from training.cost import IMAGENET_IMAGES, count_gflop, describe, matmul_peak
from training.curves import save_curves
from training.data.images import ImageSource, RandomViews, create_loader
from training.data.sampler import DeterministicBatchSampler
from training.draws import draw
from training.grids import FixedGrid
from training.networks.discriminator import STDDEV_GROUP
from training.recipes import METHODS, AdversarialRecipe, Recipe
from training.run.checkpoint import CheckpointError, load_checkpoint
from training.run.clock import StepClock
from training.run.folder import RunError, create_run_folder, find_checkpoint, versions
from training.run.record import Intervals, RunRecord
from training.run.seeding import derive_seed
from training.run.signals import EXIT_INTERRUPTED, Interrupted, StopRequest
from training.step import training_step
from training.team import Team, create_team
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
    micro_batches: int = 1
    """Passes a step is cut into on each process; the gradients add up. More passes need less memory."""
    grad_checkpointing: bool = False
    """Compute the autoencoder's blocks twice instead of keeping what is inside them: less memory, slower."""
    compile: bool = False
    """torch.compile the networks: faster steps after a slow first one; the result differs by float rounding only."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl; each needs its package."""

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ValueError(f"--micro-batches is {self.micro_batches}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a run reads and writes."""

    data: Path | None = None
    """A folder of images (any nesting) or a .tar of them."""
    out: Path | None = None
    """The run folder."""
    dry_run: bool = False
    """Print the resolved recipe and what it costs, and stop."""
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
class Estimate:
    """What --dry-run assumes."""

    images: int = IMAGENET_IMAGES
    """Size of the data set where no --data is given; ImageNet-1K's by default."""
    devices: int = 8
    """Processes, one a device."""
    peak_tflops: float = 312.0
    """A device's matrix-product peak, 10^12 operations a second; an A100's in bf16 by its data sheet."""
    assumed_utilisation: float = 0.4
    """Share of that peak that the run reaches; metrics.jsonl and training/benchmark.py say what yours does."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole command."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    runtime: tyro.conf.OmitArgPrefixes[Runtime]
    output: tyro.conf.OmitArgPrefixes[Output]
    estimate: tyro.conf.OmitArgPrefixes[Estimate]

    @property
    def places(self) -> tuple[Path, Path]:
        """Where images come from and where the run goes.

        Raises:
            ValueError: If one of them was not given.
        """
        data, out = self.output.data, self.output.out
        if data is None or out is None:
            raise ValueError("give --data (a folder or .tar of images) and --out (the run folder), or --dry-run")
        return data, out


def check_batch(recipe: Recipe, runtime: Runtime, num_processes: int) -> None:
    """Refuse a batch that cannot be cut as it should.

    Raises:
        ValueError: If passes would be of different size, or would change a loss.
    """
    passes = num_processes * runtime.micro_batches
    # groups of the minibatch statistic must not depend on how the batch is cut
    multiple = passes * STDDEV_GROUP if isinstance(recipe, AdversarialRecipe) else passes
    if recipe.batch_size % multiple:
        raise ValueError(
            f"--batch-size {recipe.batch_size} must be a multiple of {multiple} for {num_processes} process(es), "
            f"--micro-batches {runtime.micro_batches} and --method {recipe.method}"
        )
    if getattr(recipe, "adaptive_weight", False) and runtime.micro_batches > 1:
        raise ValueError("--adaptive-weight compares gradients of whole batches: leave --micro-batches at 1")


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then a half-cosine to 0; the rate is a function of the step alone."""
    warmup_steps = round(recipe.warmup * total_steps)
    return CosineLRScheduler(
        optimizer, t_initial=total_steps - warmup_steps, warmup_t=warmup_steps, warmup_prefix=True, t_in_epochs=False
    )


def pretrain(config: Config) -> None:
    """Run one command, from the recipe to the exported weights.

    Raises:
        RunError: If the run folder, the images or the loss do not allow to go on.
        Interrupted: If a signal asked the run to stop; its checkpoint is written.
    """
    recipe, runtime, (data, out) = config.recipe, config.runtime, config.places
    # without cpu=True, accelerate takes the processes of a launcher on a machine without GPUs for single ones
    use_cpu = runtime.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=use_cpu,
        log_with=list(runtime.track) or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
    )
    check_batch(recipe, runtime, accelerator.num_processes)
    source = ImageSource(data, cache=runtime.cache_images)
    team = create_team(recipe, accelerator.device)
    total_steps = recipe.num_steps(len(source))
    description = {
        "recipe": dataclasses.asdict(recipe),
        "data": {"name": data.name, "images": len(source)},
        "total_steps": total_steps,
        "versions": versions(),
    }
    checkpoint = find_checkpoint(out, description, resume=config.output.resume == "auto")
    accelerator.wait_for_everyone()  # nobody may find the folder that this very run creates
    if accelerator.is_main_process:
        create_run_folder(out, description)
    accelerator.init_trackers(
        "perceptual_mae_models", config={k: str(v) for k, v in dataclasses.asdict(recipe).items()}
    )
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "broken": 0}
    if checkpoint:
        progress = load_checkpoint(checkpoint, team.modules(), team.optimizers())
    progress = optimise(config, accelerator, source, team, total_steps, progress)
    if accelerator.is_main_process:
        save_run_weights(out, team.exported, recipe, progress)
        save_curves(out / "metrics.jsonl", out / "curves.png")
    accelerator.end_training()


def optimise(
    config: Config,
    accelerator: Accelerator,
    source: ImageSource,
    team: Team,
    total_steps: int,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """The loop: batch, step, record; from `progress["step"]` to `total_steps`.

    Returns:
        The progress at the end.

    Raises:
        RunError: If images or losses do not allow to go on.
        Interrupted: If a signal asked the run to stop; its checkpoint is written.
    """
    recipe, runtime, output, network = config.recipe, config.runtime, config.output, team.network
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    steps = range(progress["step"], total_steps)
    sampler = DeterministicBatchSampler(
        len(source), recipe.batch_size, steps, recipe.seed, rank=rank, world_size=world_size
    )
    views = RandomViews(source, network.image_size, recipe.crop_scale, recipe.seed)
    loader = create_loader(views, sampler, workers=runtime.workers)
    network.grad_checkpointing = runtime.grad_checkpointing
    players = [team.player, *([team.adversary.player] if team.adversary else [])]
    schedulers = [create_scheduler(player.optimizer, recipe, total_steps) for player in players]
    for player in players:
        player.prepare(accelerator.prepare_model, compiled=runtime.compile)
    team.reduce_sum = lambda value: accelerator.reduce(value, reduction="sum")
    team.reduce_mean = lambda value: accelerator.reduce(value, reduction="mean")
    refresh_every = phi_refresh_steps(recipe, len(source))
    grid, clock = FixedGrid(source, network, recipe), StepClock(device)
    record = RunRecord(
        config.places[1],
        accelerator,
        team.modules(),
        team.optimizers(),
        progress,
        total_steps=total_steps,
        batch_size=recipe.batch_size,
        intervals=Intervals(log=output.log_every, checkpoint=output.checkpoint_every, grid=output.grid_every),
        keep=output.keep_checkpoints,
        max_broken=output.max_broken,
        draw=lambda path: grid.save(team.exported, path),
        clock=clock,
        utilisation=peak_share(recipe, accelerator),
    )
    with StopRequest(accelerator) as stop:
        for step, batch in zip(steps, loader, strict=True):
            # what a network draws for itself (drop path) is the same after a restart and different on every process
            torch.manual_seed(derive_seed(recipe.seed, "network", step, rank))
            images = batch.images.to(device, non_blocking=True).float() / 255  # (N, 3, H, W) in [0, 1]
            draws = draw(recipe, step, network, sampler.share).to(device)
            clock.mark("data")
            for scheduler in schedulers:
                scheduler.step_update(step)
            if refresh_every and step % refresh_every == 0:
                team.refresh_phi()
            scalars = training_step(team, images, draws, step, micro_batches=runtime.micro_batches, mark=clock.mark)
            if team.ema:
                team.ema.update(network)
            record.after_step(scalars, team.player.optimizer.param_groups[0]["lr"], batch.broken)
            if name := stop.agreed():
                record.checkpoint()
                raise Interrupted(f"{name} after step {record.step}: go on with --resume auto")
    return record.close()


def peak_share(recipe: Recipe, accelerator: Accelerator) -> float:
    """Share of all processors' matrix-product peak that one image a second takes; only the main process needs it."""
    if not accelerator.is_main_process:
        return 0.0
    peak = matmul_peak(accelerator.device, recipe.precision) * accelerator.num_processes
    return sum(count_gflop(recipe).values()) / peak


def phi_refresh_steps(recipe: Recipe, num_images: int) -> int:
    """Steps between renewals of phi's snapshot; 0: there is none."""
    if not isinstance(recipe, AdversarialRecipe) or recipe.phi != "snapshot":
        return 0
    return max(1, round(recipe.phi_refresh * num_images / recipe.batch_size))


def dry_run(config: Config) -> str:
    """What the command would do and cost."""
    estimate, data = config.estimate, config.output.data
    check_batch(config.recipe, config.runtime, estimate.devices)
    return describe(
        config.recipe,
        num_images=len(ImageSource(data)) if data else estimate.images,
        per_device=config.recipe.batch_size // (estimate.devices * config.runtime.micro_batches),
        peak_tflops=estimate.peak_tflops,
        utilisation=estimate.assumed_utilisation,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line (by default this process's) and run it."""
    # a method's defaults depend on the model, so the model is looked up before the real parser is built
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=Recipe.model)
    model = peek.parse_known_args(argv)[0].model
    configs = {
        name: (
            (recipe.__doc__ or "").split("\n")[0],
            Config(recipe=recipe(model), runtime=Runtime(), output=Output(), estimate=Estimate()),
        )
        for name, recipe in METHODS.items()
    }
    try:
        config = tyro.extras.overridable_config_cli(configs, args=argv)
        if config.output.dry_run:
            print(dry_run(config))
        else:
            pretrain(config)
    except Interrupted as interruption:
        print(f"pretrain.py: stopped by {interruption}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from interruption
    except (RunError, CheckpointError, ValueError, FileNotFoundError, ImageError) as error:
        raise SystemExit(f"pretrain.py: {error}") from error


if __name__ == "__main__":
    main()
