"""Learning with labels, for fine-tuning and dense transfer: the engine of pretraining with another loss.

Order, draws, checkpoints, metrics and signals are those of `training/pretrain.py`: a killed run goes on and ends with
the same bits, and several processes share every batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from perceptual_mae_models.images import ImageError
from training.data.images import LOADER_PATIENCE
from training.data.sampler import DeterministicBatchSampler, ImageKey
from training.run.checkpoint import load_checkpoint
from training.run.clock import StepClock
from training.run.engine import create_accelerator, require_same_step
from training.run.folder import create_run_folder, find_checkpoint, own_run_folder, versions
from training.run.player import NonFiniteGuard, Player, avoid_slow_attention, update_weights
from training.run.record import Intervals, RunRecord
from training.run.schedule import create_scheduler
from training.run.seeding import derive_seed
from training.run.signals import Interrupted, StopRequest, ignore_in_workers
from training.settings import at_least, refuse


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a supervised run is computed.

    It decides speed and rounding alone, except where something is drawn inside a pass (mixup, drop path, proposals,
    batch statistics): there the number of passes changes the draw.
    """

    device: str = "auto"
    """auto: a GPU where there is one."""
    workers: int = 0
    """Processes that load images."""
    micro_batches: int = 1
    """Passes a step is cut into on each process; the gradients add up."""
    compile: bool = False
    """torch.compile the network."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        refuse(self, at_least(self, {"micro_batches": 1, "checkpoint_every": 1, "log_every": 1}))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to learn."""

    steps: int
    warmup_steps: int
    """Steps in which the learning rates rise from 0 to their peak; a half-cosine to 0 follows."""
    batch_size: int
    """Images a step, over all processes and micro-batches together."""
    clip_grad: float | None = None
    """Largest gradient norm. None: no limit."""
    ema_decay: float | None = None
    """Decay a step of an exponential moving average of the weights, which is what comes out then. None: none."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16: autocast of the whole loss function, which keeps its own islands in float32."""
    seed: int = 0
    """Decides order and every draw."""


@dataclass
class Task:
    """What is learned, from what, by which loss."""

    network: nn.Module
    """Its parameters that require no gradient stay as they are."""
    optimizer: torch.optim.Optimizer
    """Fused AdamW or SGD over the others; groups may carry `lr_scale`."""
    dataset: "Dataset[Any]"
    """Has a length; takes an `ImageKey`, whose image and epoch with the schedule's seed decide every draw of the item
    (see `derive_seed`). Gives an `ImageError` in place of an item whose image does not decode."""
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]
    """(model, collated items on the device) -> means over the items; their sum is minimised."""
    collate: Callable[[list[Any]], Any] = field(default=torch.utils.data.default_collate)
    multiple: int = 1
    """A pass takes a multiple of so many items."""


def run_name(protocol: str, description: dict[str, Any]) -> str:
    """A folder's name that changes with whatever decides a run's result."""
    facts = json.dumps({key: description[key] for key in ("recipe", "data")}, sort_keys=True)
    return f"{protocol}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def fit(
    task: Task, schedule: Schedule, description: dict[str, Any], out: Path, engine: Engine
) -> tuple[nn.Module, float]:
    """Train, going on from the newest checkpoint in `out` where there is one.

    Args:
        task: What to learn.
        schedule: How.
        description: JSON-able `recipe` and `data`: what decides the result.
        out: The run folder.
        engine: Runtime.

    Returns:
        The network that the run is for, in evaluation mode on its device, and the seconds it has trained.

    Raises:
        ValueError: If the batch cannot be shared.
        RunError: If a loss is not finite, or somebody else's run goes on in the folder.
        ImageError: At an image that does not decode.
        Interrupted: If a signal asked the run to stop; its checkpoint is written.
    """
    accelerator = create_accelerator(out, device=engine.device)
    multiple = accelerator.num_processes * engine.micro_batches * task.multiple
    if schedule.batch_size % multiple:
        raise ValueError(
            f"batches of {schedule.batch_size} images must be a multiple of {multiple} for {accelerator.num_processes} "
            f"process(es) and {engine.micro_batches} micro-batch(es)"
        )
    checkpoint = find_checkpoint(out, description, resume=True)
    accelerator.wait_for_everyone()  # nobody may find the folder that this very run creates
    with own_run_folder(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            create_run_folder(out, {**description, "total_steps": schedule.steps, "versions": versions()})
        accelerator.wait_for_everyone()
        network = task.network.to(accelerator.device)
        avoid_slow_attention(network, schedule.precision, accelerator.device)
        ema = ModelEmaV3(network, decay=schedule.ema_decay) if schedule.ema_decay else None
        modules = {"network": network} | ({"ema": ema.module} if ema else {})
        progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "broken": 0}
        if checkpoint:
            progress = load_checkpoint(checkpoint, modules, {"optimizer": task.optimizer})
        require_same_step(accelerator, progress["step"])
        if progress["step"] < schedule.steps:
            progress = _optimise(task, schedule, out, engine, accelerator, modules, ema, progress)
    result = modules.get("ema", network).eval()
    # the last step leaves every process with batch statistics of its own; the checkpoint holds those of the first
    broadcast(list(result.buffers()))
    return result, progress["seconds"]


def _optimise(
    task: Task,
    schedule: Schedule,
    out: Path,
    engine: Engine,
    accelerator: Accelerator,
    modules: dict[str, nn.Module],
    ema: ModelEmaV3 | None,
    progress: dict[str, Any],
) -> dict[str, Any]:
    network, optimizer, device = task.network, task.optimizer, accelerator.device
    player = Player(network, optimizer, schedule.clip_grad)
    player.prepare(accelerator.prepare_model, compiled=engine.compile)
    guard = NonFiniteGuard(torch.zeros((), device=device))

    def reduce_sum(value: Tensor) -> Tensor:
        found: Tensor = accelerator.reduce(value, reduction="sum")
        return found

    scheduler = create_scheduler(optimizer, schedule.steps, schedule.warmup_steps)
    clock, steps = StepClock(device), range(progress["step"], schedule.steps)
    parts = iter(_load(task, schedule, steps, engine, accelerator))
    record = RunRecord(
        out,
        accelerator,
        modules,
        {"optimizer": optimizer},
        progress,
        total_steps=schedule.steps,
        batch_size=schedule.batch_size,
        intervals=Intervals(log=engine.log_every, checkpoint=engine.checkpoint_every, grid=0),
        keep=2,
        max_broken=0.0,
        advice="Lower the learning rate, limit the gradient norm or take float32: --help names the protocol's flags.",
        clock=clock,
    )
    network.train()
    with StopRequest(accelerator) as stop:
        for step in steps:
            # what a network draws for itself (drop path) is the same after a restart and different on every process
            torch.manual_seed(derive_seed(schedule.seed, "network", step, accelerator.process_index))
            scheduler.step_update(step)
            scalars = _accumulate(task, schedule, player, islice(parts, engine.micro_batches), engine, clock, device)
            [norm] = update_weights([player], [*scalars.values()], guard, reduce_sum)
            if ema:
                ema.update(network)
            clock.mark("optimiser")
            record.after_step({**scalars, "grad_norm": norm}, max(g["lr"] for g in optimizer.param_groups), [])
            if name := stop.agreed():
                record.checkpoint()
                stop.wait_for_all()
                raise Interrupted(f"{name} after step {record.step} of {out}: the same command goes on")
            clock.mark("record")
    return record.close()


def _accumulate(
    task: Task,
    schedule: Schedule,
    player: Player,
    parts: Iterable[Any],
    engine: Engine,
    clock: StepClock,
    device: torch.device,
) -> dict[str, Tensor]:
    """Gradients of one step's micro-batches; returns the means of their losses."""
    scalars: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        if isinstance(part, ImageError):
            raise part
        batch = send_to_device(part, device, non_blocking=True)
        clock.mark("data")
        last = index == engine.micro_batches - 1
        with nullcontext() if last else player.local_gradients():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=schedule.precision == "bf16"):
                terms = task.losses(player.model, batch)
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            (loss / engine.micro_batches).backward()
        for name, value in {"loss": loss, **{f"loss/{name}": term for name, term in terms.items()}}.items():
            scalars[name] = scalars.get(name, 0) + value.detach().float() / engine.micro_batches
        clock.mark("network")
    return scalars


class _Parts(Sampler[list[ImageKey]]):
    """The batches of a sampler, each as so many contiguous parts."""

    def __init__(self, batches: DeterministicBatchSampler, parts: int) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        return len(self.batches) * self.parts

    def __iter__(self) -> Iterator[list[ImageKey]]:
        for batch in self.batches:
            size = len(batch) // self.parts
            yield from (batch[start : start + size] for start in range(0, len(batch), size))


class _Collate:
    """Collates items, or hands on the error that stands in place of one: raised here, it would arrive as text."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, ImageError)), None) or self.collate(items)


def _load(task: Task, schedule: Schedule, steps: range, engine: Engine, accelerator: Accelerator) -> "DataLoader[Any]":
    dataset: Any = task.dataset
    sampler = DeterministicBatchSampler(
        len(dataset),
        schedule.batch_size,
        steps,
        schedule.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return DataLoader(
        dataset,
        batch_sampler=_Parts(sampler, engine.micro_batches),
        num_workers=engine.workers,
        timeout=LOADER_PATIENCE if engine.workers else 0,
        collate_fn=_Collate(task.collate),
        worker_init_fn=ignore_in_workers,
        pin_memory=torch.cuda.is_available(),
    )
