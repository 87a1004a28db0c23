"""Weighted k-NN against a brute-force reference, and what the embedded encoder is worth."""

import math
from pathlib import Path

import pytest
import torch

from perceptual_mae_models.features import FeatureExtractor
from training.data.images import ImageSource, keep_some
from training.evaluate.features import extract
from training.evaluate.knn import knn_predict


def brute_force(
    bank: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, k: int, temperature: float, classes: int
) -> int:
    similarity = [
        (sum(a * b for a, b in zip(query.tolist(), row.tolist(), strict=True)) / (query.norm() * row.norm())).item()
        for row in bank
    ]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes = [0.0] * classes
    for i in nearest:
        votes[int(labels[i])] += math.exp(similarity[i] / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_equals_brute_force(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(40, 6, generator=generator), torch.randn(25, 6, generator=generator) * 3
    labels = torch.randint(4, (40,), generator=generator)
    predicted = knn_predict(bank, labels, queries, [k, 3], chunk=7)[k]
    assert predicted.tolist() == [brute_force(bank, labels, query, k, 0.07, 4) for query in queries]


def test_leaving_one_out_equals_a_bank_without_it() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(30, 6, generator=generator), torch.randint(4, (30,), generator=generator)
    expected = []
    for index in range(30):
        others = torch.arange(30) != index
        expected.append(knn_predict(bank[others], labels[others], bank[[index]], [7])[7])
    for chunk in (8, 1024):
        found = knn_predict(bank, labels, bank, [7, 29], leave_one_out=True, chunk=chunk)[7]
        assert torch.equal(found, torch.cat(expected))
    with pytest.raises(ValueError, match="between 1 and the 29 bank entries"):
        knn_predict(bank, labels, bank, [30], leave_one_out=True)
    with pytest.raises(ValueError, match="29 queries are not the bank of 30"):
        knn_predict(bank, labels, bank[1:], [7], leave_one_out=True)


def test_near_neighbours_outvote_many_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    assert knn_predict(bank, labels, torch.tensor([[1.0, 0.1]]), [4])[4].tolist() == [0]


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 4 bank entries"):
        knn_predict(torch.rand(4, 2), torch.zeros(4, dtype=torch.long), torch.rand(1, 2), [2, k])


@pytest.mark.slow
def test_embedded_encoder_knows_imagenettes_classes(real_data: Path) -> None:
    # a fifth of the images: with all of them it is 54 %, of a random encoder 32 %
    extractor = FeatureExtractor("vit_pico_patch8_pmae", pool="avg")
    bank, queries = (
        keep_some(ImageSource(real_data / f"imagenette-128-{split}.tar"), count)
        for split, count in (("train", 1900), ("val", 800))
    )
    assert bank.classes == queries.classes
    features = extract(extractor, bank), torch.tensor(bank.labels), extract(extractor, queries)
    accuracy = (knn_predict(*features, [20])[20] == torch.tensor(queries.labels)).double().mean().item()
    assert accuracy >= 0.42
