"""The step: it learns, it withholds bad updates, and processes add up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_autoencoder import small_autoencoder
from torch.nn.parallel import DistributedDataParallel

from training.recipes import Recipe
from training.step import NonFiniteGuard, clip_gradient, generator_update, mae_loss

RECIPE = Recipe(method="mae", precision="fp32")


def fused_adamw(network: torch.nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr, fused=True)


def test_four_images_are_overfitted() -> None:
    torch.manual_seed(0)
    network = small_autoencoder()
    optimizer, guard = fused_adamw(network, 3e-3), NonFiniteGuard(torch.zeros(()))
    images, noise = torch.rand(4, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3), torch.rand(4, 16)
    recipe = Recipe(method="mae", precision="fp32", norm_pix_loss=False)
    history = [
        generator_update(network, network, optimizer, guard, images, noise, recipe)["loss"].item() for _ in range(250)
    ]
    assert history[-1] < 0.03 * history[0]


def test_a_non_finite_gradient_withholds_this_and_later_updates() -> None:
    network = small_autoencoder()
    optimizer, guard = fused_adamw(network), NonFiniteGuard(torch.zeros(()))
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    before = {name: p.clone() for name, p in network.named_parameters()}
    bad = images.clone()
    bad[0, 0, 0, 0] = float("nan")
    scalars = generator_update(network, network, optimizer, guard, bad, noise, RECIPE)
    assert not scalars["grad_norm"].isfinite()
    generator_update(network, network, optimizer, guard, images, noise, RECIPE)
    assert guard.tripped.item() == 1
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())

    fresh = NonFiniteGuard(torch.zeros(()))
    generator_update(network, network, optimizer, fresh, images, noise, RECIPE)
    assert any(not torch.equal(before[name], p) for name, p in network.named_parameters())


@pytest.mark.parametrize(("limit", "expected"), [(None, 5.0), (1.0, 1.0)])
def test_clipping_reports_the_norm_and_scales_down(limit: float | None, expected: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradient([parameter], limit).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_losses_are_float32_under_autocast() -> None:
    network = small_autoencoder()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(images, torch.rand(2, 16))
        assert output.pred.dtype == torch.bfloat16
        assert mae_loss(output, images, network, norm_pix_loss=True)["reconstruction"].dtype == torch.float32


def gradients(network: torch.nn.Module, model: torch.nn.Module, share: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 32, 32, generator=generator)[share]
    noise = torch.rand(4, 16, generator=generator)[share]
    output = model(images, noise)
    mae_loss(output, images, network, norm_pix_loss=True)["reconstruction"].backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def worker(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = small_autoencoder()
    torch.save(
        gradients(network, DistributedDataParallel(network), slice(2 * rank, 2 * rank + 2)), folder / f"{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_two_gloo_processes_give_the_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], cwd=Path(__file__).parent)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    network = small_autoencoder()
    joined = gradients(network, network, slice(None))
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shared.keys() == joined.keys()
        for name, gradient in joined.items():
            torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-5)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
