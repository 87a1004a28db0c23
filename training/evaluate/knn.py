"""Weighted k-nearest-neighbour accuracy of frozen features: DINO's protocol (Caron et al., ICCV 2021, section 4.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
"""DINO's."""


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    *,
    temperature: float = TEMPERATURE,
    leave_one_out: bool = False,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Classify by a vote of the k most similar bank entries, each weighted by exp(cosine / temperature).

    Args:
        bank: (M, D) features with known labels, of any length.
        bank_labels: (M,) int64.
        queries: (N, D).
        ks: Numbers of voters to try, each at most M, or M - 1 with `leave_one_out`.
        temperature: Lower ones give the nearest neighbours more weight.
        leave_one_out: The queries are the bank, in its order, and none votes for itself.
        chunk: Queries compared at a time; memory is chunk * M floats, a quarter of a gigabyte by default.

    Returns:
        For each k, (N,) int64 predicted labels.

    Raises:
        ValueError: If a k exceeds the voters.
    """
    if leave_one_out and len(queries) != len(bank):
        raise ValueError(f"{len(queries)} queries are not the bank of {len(bank)}")
    others = len(bank) - 1 if leave_one_out else len(bank)
    if not 1 <= min(ks) <= max(ks) <= others:
        raise ValueError(f"k is {', '.join(map(str, ks))}: it must be between 1 and the {others} bank entries")
    bank = F.normalize(bank.float(), dim=1)
    num_classes = int(bank_labels.max()) + 1
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    chunk = chunk or max(1, 2**26 // len(bank))
    for number, part in enumerate(F.normalize(queries.float(), dim=1).split(chunk)):
        similarity = part @ bank.T  # (n, M)
        if leave_one_out:
            similarity.diagonal(number * chunk).fill_(-torch.inf)
        similarity, nearest = similarity.topk(max(ks), dim=1)  # (n, k), most similar first
        weights, voted = (similarity / temperature).exp(), bank_labels[nearest]
        for k, found in predictions.items():
            votes = torch.zeros(len(part), num_classes, device=bank.device)
            found.append(votes.scatter_add_(1, voted[:, :k], weights[:, :k]).argmax(dim=1))
    return {k: torch.cat(found) for k, found in predictions.items()}
