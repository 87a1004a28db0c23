"""Networks that learn: what their passes go through, and the end of a step."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Player:
    """A network that learns."""

    network: nn.Module
    """The bare network: checkpoints, penalties and pictures use it."""
    optimizer: torch.optim.Optimizer
    """Over its parameters, fused."""
    clip_grad: float | None = None
    """Largest gradient norm. None: no limit."""
    fast: nn.Module = field(init=False)
    """`network`, or its compiled form."""
    model: nn.Module = field(init=False)
    """`fast`, or its distributed wrapper: what the passes that learn go through."""

    def __post_init__(self) -> None:
        self.fast = self.model = self.network

    def prepare(self, distribute: Callable[[nn.Module], nn.Module], *, compiled: bool) -> None:
        """Compile, on request, and distribute what the passes go through."""
        fast: Any = torch.compile(self.network) if compiled else self.network
        self.fast, self.model = fast, distribute(fast)

    def local_gradients(self) -> AbstractContextManager[None]:
        """Within it, gradients add up in this process only: all micro-batches but the last."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()


@dataclass
class NonFiniteGuard:
    """Stops updates, without a device synchronisation, from the first non-finite gradient or loss on.

    The fused optimisers skip a step whose `found_inf` is 1: it is set here and never cleared, so the weights stay those
    of the last good step until the next log line, where the mean of what was not finite stops the run.
    """

    tripped: Tensor

    def watch(self, values: list[Tensor], reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Note this step's losses and gradient norms; what one process sees, all obey."""
        bad = (~torch.isfinite(torch.stack(values))).any().float()
        self.tripped.copy_(torch.maximum(self.tripped, reduce_sum(bad).clamp(max=1)))

    def withhold(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell a fused optimiser whether its next step may happen."""
        optimizer.found_inf = self.tripped  # type: ignore[attr-defined]


def update_weights(
    players: Sequence[Player], losses: Sequence[Tensor], guard: NonFiniteGuard, reduce_sum: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Clip, guard and step every player, from gradients of the same weights.

    Args:
        players: Who has gradients.
        losses: Scalars that must be finite for anybody to step.
        guard: Remembers whether they always were.
        reduce_sum: Sum of a tensor over the processes.

    Returns:
        Each player's gradient norm, before clipping.
    """
    norms = [clip_gradient(player.network.parameters(), player.clip_grad) for player in players]
    guard.watch([*losses, *norms], reduce_sum)
    for player in players:
        guard.withhold(player.optimizer)
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
    return norms


def clip_gradient(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Norm of the gradient before clipping; the gradient is scaled down to `limit` if it is larger."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def avoid_slow_attention(network: nn.Module, precision: str, device: torch.device) -> None:
    """Leave torch's fused attention where it costs more than it saves: in the backward pass of bf16 on processors.

    There it takes 2 (577 tokens) to 5 times (17 tokens) as long as matrix products and a softmax; not so in float32.

    Args:
        network: Of timm's blocks; changed in place.
        precision: "bf16" or "fp32".
        device: Where it learns.
    """
    if precision == "bf16" and device.type == "cpu":
        module: Any
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
