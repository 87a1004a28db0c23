"""Images that are in two sets, byte for byte."""

from dataclasses import dataclass

from training.data.images import ImageSource
from training.evaluate.features import scan_data


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Test images whose file, byte for byte, is a training image's too. Published sets have some; a count tells."""

    images: int
    """How many."""
    first: tuple[str, str] | None
    """Names of the first one and of its double in the training set."""
    compared: tuple[int, int]
    """Test and training images that were compared; of huge sets not all are."""

    def __str__(self) -> str:
        where = "" if self.first is None else f", the first: {self.first[0]}, which is {self.first[1]} in --train"
        return f"{self.images} of {self.compared[0]} test images are among {self.compared[1]} training images{where}"


def find_duplicates(train: ImageSource, test: ImageSource) -> Duplicates:
    """Count test images that are training images; without reading a file that `scan_data` has read."""
    known = {digest: index for index, digest in reversed(scan_data(train).digests.items())}
    asked = scan_data(test).digests
    found = [(index, known[digest]) for index, digest in asked.items() if digest in known]
    first = (test.name(found[0][0]), train.name(found[0][1])) if found else None
    return Duplicates(images=len(found), first=first, compared=(len(asked), len(scan_data(train).digests)))
