"""Penalties on derivatives.

Each needs a second derivative, for which fused attention and compiled code have no rule: pass bare networks; attention
falls back to plain arithmetic here, in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Judge = Callable[[tuple[Tensor, ...]], Tensor]
"""Maps a pyramid of (N, 3, h, w) images to logits (N,)."""


def r1_penalty(judge: Judge, real: Sequence[Tensor], gamma: float) -> Tensor:
    """R1 (Mescheder et al. 2018): gamma / 2 times the mean squared gradient norm at real images.

    Args:
        judge: The discriminator, augmentation included.
        real: (N, 3, h, w) images, one tensor a scale; the norm is over all scales.
        gamma: Strength.
    """
    squares = _input_gradient_squares(judge, tuple(image.detach() for image in real))
    return gamma / 2 * squares.mean()


def gradient_penalty(
    judge: Judge, real: Sequence[Tensor], fake: Sequence[Tensor], epsilon: Tensor, weight: float = 10.0
) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): weight times the mean of (gradient norm - 1)^2 between real and fake images.

    Args:
        judge: The discriminator, augmentation included.
        real: (N, 3, h, w) images, one tensor a scale.
        fake: As `real`.
        epsilon: (N,) in [0, 1], the share of the real image, the same at every scale.
        weight: Strength.
    """
    share = epsilon.view(-1, 1, 1, 1)
    between = tuple((share * r + (1 - share) * f).detach() for r, f in zip(real, fake, strict=True))
    norms = (_input_gradient_squares(judge, between) + 1e-12).sqrt()
    return weight * (norms - 1).square().mean()


def path_lengths(decode: Callable[[Tensor], Tensor], latent: Tensor, noise: Tensor) -> Tensor:
    """How far an image moves with its latent (Karras et al. 2020, section 3.2).

    Args:
        decode: Maps the latent to images.
        latent: (N, T, D) float32 that requires a gradient.
        noise: (N, 3, H, W) standard normal.

    Returns:
        (N,) lengths: root of the mean over tokens of the squared norm of the Jacobian's product with the noise.
    """
    with _second_derivatives(latent):
        images = decode(latent)
        direction = noise / (images.shape[2] * images.shape[3]) ** 0.5
        (jacobian,) = torch.autograd.grad((images * direction).sum(), latent, create_graph=True)  # (N, T, D)
        assert jacobian.requires_grad
        return (jacobian.square().sum(dim=2).mean(dim=1) + 1e-12).sqrt()


def path_length_penalty(lengths: Tensor, mean_length: Tensor) -> Tensor:
    """Mean squared distance of the lengths (N,) from their running mean ()."""
    return (lengths - mean_length.detach()).square().mean()


def update_mean_length(
    mean_length: Tensor, lengths: Tensor, reduce_mean: Callable[[Tensor], Tensor], decay: float = 0.01
) -> Tensor:
    """The running mean moved by `decay` towards the mean of `lengths`, the same on every process."""
    return mean_length.lerp(reduce_mean(lengths.detach().mean()), decay)


def lazy_optimizer_settings(
    lr: float, betas: tuple[float, float], interval: int | None
) -> tuple[float, tuple[float, float]]:
    """Adam's settings for a network with a lazy penalty (Karras et al. 2020, appendix B).

    Args:
        lr: Learning rate without one.
        betas: Momenta without one.
        interval: Steps between penalties; None: there is none.

    Returns:
        lr * c and betas ** c with c = interval / (interval + 1).
    """
    c = interval / (interval + 1) if interval else 1.0
    return lr * c, (betas[0] ** c, betas[1] ** c)


def _input_gradient_squares(judge: Judge, images: tuple[Tensor, ...]) -> Tensor:
    """(N,) squared norms of the logits' gradient, over all pixels of all scales."""
    with _second_derivatives(images[0]):
        inputs = tuple(image.float().requires_grad_() for image in images)
        gradients = torch.autograd.grad(judge(inputs).float().sum(), inputs, create_graph=True)
        assert all(gradient.requires_grad for gradient in gradients)
        return torch.stack([gradient.square().sum(dim=(1, 2, 3)) for gradient in gradients]).sum(dim=0)


@contextmanager
def _second_derivatives(like: Tensor) -> Iterator[None]:
    with (
        torch.enable_grad(),
        torch.autocast(like.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield
