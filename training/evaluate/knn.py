"""Weighted k-nearest-neighbour accuracy of frozen features: DINO's protocol (Caron et al., ICCV 2021, section 4.1).

    python training/evaluate/knn.py vit_pico_patch8_pmae --train imagenette-128-train.tar --val imagenette-128-val.tar

The encoder is any name that `timm.create_model` takes; images go through the transform of its own cfg. Labels are the
names of the folders that the images lie in.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from perceptual_mae_models.features import FeatureExtractor, Pool
from training.data.images import ImageSource
from training.evaluate.features import extract


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    *,
    temperature: float = 0.07,
    leave_one_out: bool = False,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Classify by a vote of the k most similar bank entries, each weighted by exp(cosine / temperature).

    Args:
        bank: (M, D) features with known labels, of any length.
        bank_labels: (M,) int64.
        queries: (N, D).
        ks: Numbers of voters to try, each at most M, or M - 1 with `leave_one_out`.
        temperature: DINO's is 0.07.
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


def main(
    model: Annotated[str, tyro.conf.Positional],
    train: Path,
    val: Path,
    pool: Pool = "avg",
    k: int = 20,
    checkpoint: Path | None = None,
    random: bool = False,
    json_file: Path | None = None,
) -> None:
    """Weighted k-NN accuracy on --val, with the images of --train as neighbours.

    Args:
        model: A timm model name, such as vit_pico_patch8_pmae.
        train: Folder or tar with one folder a class: the neighbours.
        val: The same for the images to classify.
        pool: Mean of the patch tokens (avg) or class token (cls).
        k: Number of neighbours.
        checkpoint: A weights file to load instead of the model's own weights.
        random: Random weights: what the architecture alone is worth.
        json_file: Write the result here too.
    """
    torch.manual_seed(0)  # decides random weights, and nothing else here
    extractor = FeatureExtractor(model, pool=pool, checkpoint=checkpoint, pretrained=not random)
    bank_source, query_source = ImageSource(train), ImageSource(val)
    if bank_source.classes != query_source.classes:
        raise SystemExit(f"knn.py: {train} and {val} do not hold the same classes")
    started = time.monotonic()
    bank_labels = torch.tensor(bank_source.labels)
    bank, queries = extract(extractor, bank_source), extract(extractor, query_source)
    predictions = knn_predict(bank, bank_labels, queries, [k])[k]
    accuracy = (predictions == torch.tensor(query_source.labels)).double().mean().item()
    result = {
        "protocol": f"weighted k-NN, cosine, k={k}, T=0.07, pool={pool}",
        "bank": {"name": train.name, "images": len(bank_source)},
        "queries": {"name": val.name, "images": len(query_source)},
        "accuracy_percent": round(100 * accuracy, 2),
        "weights": extractor.metadata["weights"],
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result, indent=2))
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
