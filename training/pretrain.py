"""Pretrain an encoder on images, by any of the methods of `training/recipes.py`.

A first look, a minute on any CPU (any folder of photographs will do):

    python training/pretrain.py mae --data photos/ --model vit_pico_patch8_pmae --out runs/try --steps 100

The recipe of the embedded weights, and the paper's best method for ImageNet on eight GPUs, or on two such machines:

    python training/pretrain.py mae --data imagenette-128-train.tar --model vit_pico_patch8_pmae --out runs/pico
    torchrun --nproc-per-node 8 training/pretrain.py stylegan2_ada_p --data in1k/train --out runs/base --micro-batches 4
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 training/pretrain.py …

`--dry-run` says what a command would do and cost. A killed run goes on with the same command and `--resume auto`, and
ends, on a CPU, with the same bits. A run folder holds `recipe.json`, `metrics.jsonl`, `checkpoints/`, `grids/` and, at
the end, `curves.png`, `encoder.safetensors` and `decoder.safetensors`. `--knn-data` names labelled images on which the
features are measured on the way.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import tyro
from accelerate import Accelerator

import perceptual_mae_models  # noqa: F401  (registers the encoders in timm)
from perceptual_mae_models.weights import describe_size
from training.config import Config, Estimate, Output, Runtime
from training.cost import count_gflop, describe, matmul_peak
from training.curves import save_curves
from training.data.feed import batches, describe_data, num_images, preview
from training.data.images import ImageSource
from training.data.readers import StorageError
from training.data.stream import ImageStream
from training.draws import draw_ahead
from training.evaluate.monitor import Watch, open_watch
from training.grids import FixedGrid
from training.networks.discriminator import STDDEV_GROUP
from training.recipes import METHODS, AdversarialRecipe, Recipe
from training.run.checkpoint import ResumeError, load_checkpoint
from training.run.clock import StepClock
from training.run.engine import count_processes, create_accelerator, require_same_step
from training.run.folder import RunError, create_run_folder, find_checkpoint, own_run_folder, versions
from training.run.record import Intervals, RunRecord
from training.run.schedule import create_scheduler
from training.run.seeding import derive_seed
from training.run.signals import EXIT_INTERRUPTED, Interrupted, StopRequest
from training.step import training_step
from training.team import Team, create_team, load_initial
from training.weights import save_run_weights


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
            f"--micro-batches {runtime.micro_batches} and {recipe.method}"
        )
    if isinstance(recipe, AdversarialRecipe) and recipe.adaptive_weight and runtime.micro_batches > 1:
        raise ValueError("--adaptive-weight compares gradients of whole batches: leave --micro-batches at 1")


def pretrain(config: Config) -> None:
    """Run one command, from the recipe to the exported weights.

    Raises:
        RunError: If the run folder, the images or the loss do not allow to go on.
        Interrupted: If a signal asked the run to stop; its checkpoint is written.
    """
    recipe, runtime, (feed, out) = config.recipe, config.runtime, config.places
    accelerator = create_accelerator(out, device=runtime.device, track=runtime.track, sync_buffers=False)
    check_batch(recipe, runtime, accelerator.num_processes)
    source = feed.open()
    team = create_team(recipe, accelerator.device)
    recipe.check_data(num_images(source))
    total_steps = recipe.num_steps(num_images(source))
    description = {
        "recipe": dataclasses.asdict(recipe),
        "data": describe_data(feed, source, accelerator.num_processes),
        "total_steps": total_steps,
        "versions": versions(),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(recipe) if field.name != "method"}
    checkpoint = find_checkpoint(out, description, resume=config.output.resume == "auto", defaults=defaults)
    watch = open_watch(
        config.monitor,
        recipe,
        source,
        team.exported.encoder,
        workers=runtime.workers,
        main=accelerator.is_main_process,
        begun=checkpoint is not None,
    )
    accelerator.wait_for_everyone()  # nobody may find the folder that this very run creates
    with own_run_folder(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            create_run_folder(out, description)
            print(
                f"{recipe.method}, {recipe.model}: {total_steps} steps of {recipe.batch_size} images on "
                f"{accelerator.num_processes} x {accelerator.device.type}, into {out}",
                file=sys.stderr,
            )
        accelerator.init_trackers(
            "perceptual_mae_models", config={k: str(v) for k, v in dataclasses.asdict(recipe).items()}
        )
        progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "broken": 0}
        if checkpoint:
            progress = load_checkpoint(checkpoint, team.modules(), team.optimizers())
        elif recipe.init:
            load_initial(team)
        require_same_step(accelerator, progress["step"])
        record = create_record(config, accelerator, source, team, total_steps, progress, watch)
        progress = optimise(config, accelerator, source, team, record)
        if accelerator.is_main_process:
            save_run_weights(out, team.exported, recipe, progress)
            save_curves(out / "metrics.jsonl", out / "curves.png")
            print(f"{out / 'encoder.safetensors'}: of step {progress['step']}, the last; its decoder is beside it")
        accelerator.end_training()


def optimise(
    config: Config,
    accelerator: Accelerator,
    source: ImageSource | ImageStream,
    team: Team,
    record: RunRecord,
) -> dict[str, Any]:
    """The loop: batch, step, record; from the step that the record has come to, to the last.

    Returns:
        The progress at the end.

    Raises:
        RunError: If images or losses do not allow to go on.
        Interrupted: If a signal asked the run to stop; its checkpoint is written.
    """
    recipe, runtime, network = config.recipe, config.runtime, team.network
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    steps, clock = range(record.step, record.total_steps), record.clock
    loader = batches(
        source, recipe, network.image_size, steps, rank=rank, world_size=world_size, workers=runtime.workers
    )
    local = recipe.batch_size // world_size
    share = slice(rank * local, (rank + 1) * local)  # this process's part of a global batch
    warmup_steps = round(recipe.warmup * steps.stop)
    schedulers = [create_scheduler(optimizer, steps.stop, warmup_steps) for optimizer in team.optimizers().values()]
    distribute(team, accelerator, runtime)
    refresh_every = recipe.phi_steps(num_images(source))
    with StopRequest(accelerator) as stop:
        for step, batch, drawn in zip(steps, loader, draw_ahead(recipe, steps, network, share), strict=True):
            # what a network draws for itself (drop path) is the same after a restart and different on every process
            torch.manual_seed(derive_seed(recipe.seed, "network", step, rank))
            images = batch.images.to(device, non_blocking=True).float() / 255  # (N, 3, H, W) in [0, 1]
            draws = drawn.to(device)
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
                stop.wait_for_all()
                raise Interrupted(f"{name} after step {record.step}: go on with --resume auto")
            clock.mark("record")
    return record.close()


def create_record(
    config: Config,
    accelerator: Accelerator,
    source: ImageSource | ImageStream,
    team: Team,
    total_steps: int,
    progress: dict[str, Any],
    watch: Watch,
) -> RunRecord:
    """What keeps the run folder up to date, as the command asks for it."""
    recipe, output = config.recipe, config.output
    grid = None
    if output.grid_every and accelerator.is_main_process:
        images = preview(source, 8)
        if not images:
            raise RunError(
                f"{source.spec}: of the images looked at none decodes; --grid-every 0 goes on without pictures"
            )
        grid = FixedGrid(images, team.network, recipe)
    return RunRecord(
        config.places[1],
        accelerator,
        team.modules(),
        team.optimizers(),
        progress,
        total_steps=total_steps,
        batch_size=recipe.batch_size,
        intervals=Intervals(
            log=output.log_every,
            checkpoint=output.checkpoint_every,
            grid=output.grid_every,
            measure=watch.every,
        ),
        keep=output.keep_checkpoints,
        max_broken=output.max_broken,
        advice="In another --out: lower --blr (or --d-lr), set --clip-grad, or use --precision fp32.",
        clock=StepClock(accelerator.device),
        draw=None if grid is None else functools.partial(grid.save, team.exported),
        measure=watch.measure,
        utilisation=peak_share(recipe, accelerator),
        metadata=describe_size(team.network.encoder),
    )


def distribute(team: Team, accelerator: Accelerator, runtime: Runtime) -> None:
    """Have the team's passes go through compiled and distributed networks, and its sums over all processes."""
    team.network.grad_checkpointing = runtime.grad_checkpointing
    if isinstance(team.recipe, AdversarialRecipe) and team.recipe.adaptive_weight:
        # the weight takes a gradient of its own through the compiled graph, which may not give its buffers away then
        torch._functorch.config.donated_buffer = False
    for player in team.players.values():
        player.prepare(accelerator.prepare_model, compiled=runtime.compile)
    team.reduce_sum = lambda value: accelerator.reduce(value, reduction="sum")
    team.reduce_mean = lambda value: accelerator.reduce(value, reduction="mean")


def peak_share(recipe: Recipe, accelerator: Accelerator) -> Callable[[int], float]:
    """Share of all processors' matrix-product peak that one image a second takes, by the step it is in.

    Only the main process needs it.
    """
    if not accelerator.is_main_process:
        return lambda step: 0.0
    peak = matmul_peak(accelerator.device, recipe.precision) * accelerator.num_processes
    after = before = sum(count_gflop(recipe).values()) / peak
    start = recipe.adversarial_start if isinstance(recipe, AdversarialRecipe) else 0
    if start:
        before = sum(count_gflop(recipe, before_start=True).values()) / peak
    return lambda step: before if step < start else after


def dry_run(config: Config) -> str:
    """What the command would do and cost."""
    estimate = config.estimate
    devices = estimate.devices or (count_processes() if config.feed else 8)
    try:
        check_batch(config.recipe, config.runtime, devices)
    except ValueError as error:
        raise ValueError(f"{error}; --devices says how many processes are meant") from error
    size = num_images(config.feed.open()) if config.feed else estimate.images
    config.recipe.check_data(size)
    return describe(
        config.recipe,
        num_images=size,
        grad_checkpointing=config.runtime.grad_checkpointing,
        devices=devices,
        micro_batches=config.runtime.micro_batches,
        peak_tflops=estimate.peak_tflops,
        fp32_peak_tflops=estimate.fp32_peak_tflops,
        utilisation=estimate.assumed_utilisation,
    )


def parse(argv: Sequence[str] | None) -> Config:
    """The command that a command line (by default this process's) asks for; ends the process where it asks for none."""
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
    return tyro.extras.overridable_config_cli(configs, args=argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run it."""
    try:
        config = parse(argv)
        if config.output.dry_run:
            print(dry_run(config))
        else:
            pretrain(config)
    except Interrupted as interruption:
        print(f"pretrain.py: stopped by {interruption}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from interruption
    except (RunError, StorageError, ResumeError, ValueError, OSError) as error:
        raise SystemExit(f"pretrain.py: {error}") from error


if __name__ == "__main__":
    main()
