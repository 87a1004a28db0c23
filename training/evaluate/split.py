"""Which images decide what: training images, a held-back part of them, test images; and checks that none leak.

Hyper-parameters are chosen on the held-back part; nothing that is chosen ever sees a test image. Images that belong
together (crops of one photograph, frames of a film, a patient's slides) stay on one side of every cut.
"""

import re
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit
from torch import Tensor

from training.data.images import ImageSource
from training.evaluate.duplicates import Duplicates, find_duplicates
from training.evaluate.features import Features


def name_groups(source: ImageSource, pattern: str) -> tuple[str, ...]:
    """What each image belongs to, from its name.

    Args:
        source: The images.
        pattern: Regular expression with one group; what the group matches anywhere in a name is the image's group.

    Raises:
        ValueError: If it has no group, or an image's name does not match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--groups {pattern} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"--groups {pattern}: put one pair of parentheses around what names the group")
    groups = []
    for index in range(len(source)):
        match = compiled.search(source.name(index))
        if not match:
            raise ValueError(f"--groups {pattern} does not match the image {source.name(index)}")
        groups.append(match[1])
    return tuple(groups)


def check_pair(train: Features, test: Features) -> None:
    """Refuse a pair of sets from which no accuracy follows.

    Raises:
        ValueError: If classes differ, are less than two or not all to be learned, or if a group is in both.
    """
    if train.classes != test.classes:
        only = [sorted(set(a.classes) - set(b.classes)) for a, b in ((train, test), (test, train))]
        first, second = (", ".join(name or "images outside any class's folder" for name in names[:5]) for names in only)
        raise ValueError(f"the classes differ: only in --train: {first or 'none'}; only in --test: {second or 'none'}")
    if len(train.classes) < 2:
        raise ValueError(f"--train has one class, {train.classes[0] or 'no folders'}: put each class into a folder")
    if min(train.labels.min(), test.labels.min()) < 0:
        raise ValueError("some images have negative labels, by which data sets mark hidden ones: use another split")
    known, asked = set(train.labels.tolist()), set(test.labels.tolist())
    if missing := [train.classes[label] for label in sorted(asked - known)]:
        raise ValueError(f"--train has no image of {', '.join(missing[:5])}")
    refuse_shared_groups(train.groups or (), test.groups or ())


def refuse_copies(train: ImageSource, test: ImageSource, groups: str | None = None) -> Duplicates:
    """Refuse test images that are all learned from, or of a group that is.

    Args:
        train: What is learned from.
        test: What is judged by.
        groups: See `name_groups`; None: every image is a group of its own.

    Returns:
        The test images that are training images, where these are some.

    Raises:
        ValueError: If so.
    """
    duplicates = find_duplicates(train, test)
    if duplicates.images == duplicates.compared[0]:
        raise ValueError(f"all test images of {test.spec} are training images: nothing would follow from such a test")
    if groups:
        refuse_shared_groups(name_groups(train, groups), name_groups(test, groups))
    return duplicates


def refuse_shared_groups(train: Iterable[str], test: Iterable[str]) -> None:
    """Refuse groups that are on both sides.

    Raises:
        ValueError: If there is one.
    """
    if shared := set(train) & set(test):
        raise ValueError(
            f"training and test images share {len(shared)} groups, such as {min(shared)}: their images would leak"
        )


def hold_back(features: Features, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut training images in two, each class in proportion and no group in both.

    Args:
        features: The training images; only labels and groups count.
        share: Of the images to hold back, in (0, 0.5].
        seed: Decides which.

    Returns:
        Numbers of the images to fit with and of those held back, both ascending.

    Raises:
        ValueError: If a class has a single image or group.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"--hold-back is {share}: it must be above 0 and at most 0.5")
    labels = features.labels.numpy()
    if features.labels.unique(return_counts=True)[1].min() < 2:
        raise ValueError("a class of --train has a single image: none can be held back to choose hyper-parameters with")
    if features.groups is None:
        held = max(len(set(labels.tolist())), round(share * len(labels)))
        splitter = StratifiedShuffleSplit(1, test_size=held, random_state=seed)
        fit, rest = next(splitter.split(labels, labels))
    else:
        fit, rest = _hold_groups_back(features, share, seed)
    return torch.as_tensor(fit).sort().values, torch.as_tensor(rest).sort().values


def _hold_groups_back(features: Features, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    labels, groups = features.labels.numpy(), features.groups
    if len(set(groups or ())) < 2:
        raise ValueError("all images of --train belong to one group: none can be held back")
    # more folds than groups, or than images in every class, cannot be in proportion
    folds = min(round(1 / share), len(set(groups or ())), int(features.labels.bincount().max()))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    whole = [cut for cut in splitter.split(labels, labels, groups) if set(labels[cut[0]]) == set(labels)]
    if not whole:
        raise ValueError("a class of --train is in too few groups to hold one back and still learn it")
    wanted = share * len(labels)
    return min(whole, key=lambda cut: abs(len(cut[1]) - wanted))
