"""Measure what an evaluation costs on this machine.

    python training/evaluate/speed.py                                  # on numbers drawn here
    python training/evaluate/speed.py --data photos/ --model vit_base_patch16_pmae --out speed.json

- seconds of k-NN (every k) and of the linear probe (sweep and final head) on cached features: 50,000 to learn from and
  10,000 to test on, as CIFAR-10 has, unless told otherwise;
- images a second that `extract` makes of decoded images, relative to the bare model on ready batches: batches of both
  take turns, so that a machine that slows down slows both; the median over rounds (and the same in CPU seconds, for a
  machine that others use too);
- peak memory of extracting few and many images, in a process of its own each, above what it holds before.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from perceptual_mae_models.features import FeatureExtractor
from training.data.images import ImageSource
from training.evaluate.features import Features, cut, extract, load_views
from training.evaluate.knn import knn_predict
from training.evaluate.linear import LEARNING_RATES, fit_probe, judge
from training.run.memory import call_in_fresh_process, resident_mb

KS = (10, 20, 100, 200)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "vit_pico_patch8_pmae"
    """The encoder, a timm name."""
    data: str | None = None
    """Images to extract features of: a folder, .tar, idx file or hf: data set. None: noise."""
    images: int = 256
    """How many of them a round encodes."""
    batch_size: int = 128
    """Images a forward pass."""
    rounds: int = 31
    """Turns of `extract` and of the bare model."""
    memory: tuple[int, int] = (2000, 8000)
    """Few and many images to compare the peak memory of."""
    rows: int = 60_000
    """Features, of which a sixth are to test on."""
    width: int = 192
    """Columns of the features."""
    classes: int = 10
    """Classes of the features."""
    epochs: int = 100
    """Passes of the linear probe."""
    threads: int = 2
    """Threads of the CPU."""
    out: Path | None = None
    """Write the figures there as JSON."""


class _Made(ImageSource):
    """Images that are in no file: `make` gives each by its number, when it is asked for."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Any:
        """What `make` gives."""
        return self.make(index)


def _noise(count: int, side: int) -> _Made:
    """Coloured noise, none of which takes memory before it is drawn."""

    def draw(index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8))

    return _Made(count, draw)


def _timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds on the wall and of all threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def measure_protocols(options: Options) -> dict[str, dict[str, float]]:
    """Seconds that k-NN and the linear probe take on normal clouds, one a class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(options.rows) % options.classes
    centres = torch.randn(options.classes, options.width, generator=generator) / 4
    rows = centres[labels] + torch.randn(options.rows, options.width, generator=generator)
    names, cut = tuple(map(str, range(options.classes))), options.rows * 5 // 6
    train, test = Features(rows[:cut], labels[:cut], names), Features(rows[cut:], labels[cut:], names)
    return {
        "knn": _timed(lambda: knn_predict(train.rows, train.labels, test.rows, KS)),
        "linear": _timed(lambda: judge(fit_probe(train, epochs=options.epochs).probe, test)),
    }


def measure_extraction(options: Options) -> dict[str, float]:
    """Images a second of `extract` and of the bare model, on the same decoded images."""
    extractor = FeatureExtractor(options.model)
    source = ImageSource(options.data) if options.data else _noise(options.images, 2 * max(extractor.input_size))
    numbers = range(min(options.images, len(source)))
    views = torch.cat(list(load_views(source, extractor.transform, cut(numbers, options.batch_size), workers=0)))
    extractor.transform = lambda view: view  # type: ignore[assignment, return-value]
    ready, batches = _Made(len(views), views.__getitem__), views.split(options.batch_size)

    @torch.inference_mode()
    def run_bare() -> None:
        for batch in batches:
            extractor.model.forward_features(batch.to(extractor.device)).cpu()

    def run_extract() -> None:
        extract(extractor, ready, batch_size=options.batch_size)

    spent: dict[str, list[dict[str, float]]] = {"bare": [], "extract": []}
    for number in range(options.rounds + 1):
        turns = [("bare", run_bare), ("extract", run_extract)]
        for name, work in turns if number % 2 else reversed(turns):
            spent[name].append(_timed(work))
    bare, ours = spent["bare"][1:], spent["extract"][1:]  # the first round warms up
    pairs = list(zip(bare, ours, strict=True))
    return {
        "bare_images_per_second": len(views) / statistics.median(it["seconds"] for it in bare),
        "extract_images_per_second": len(views) / statistics.median(it["seconds"] for it in ours),
        "ratio": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
        "cpu_ratio": statistics.median(one["cpu_seconds"] / other["cpu_seconds"] for one, other in pairs),
    }


def measure_memory(options: Options) -> dict[str, float]:
    """Peak megabytes by number of images."""
    return {str(count): call_in_fresh_process(_peak_mb, options, count) for count in options.memory}


def _peak_mb(options: Options, count: int) -> float:
    torch.set_num_threads(options.threads)
    extractor = FeatureExtractor(options.model)
    before = resident_mb("VmRSS")
    extract(extractor, _noise(count, 2 * max(extractor.input_size)), batch_size=options.batch_size)
    return resident_mb("VmHWM") - before


def show(measured: dict[str, Any]) -> str:
    """The figures as a table."""
    protocols, extraction = measured["protocols"], measured["extraction"]
    rows = [
        (f"k-NN, k = {', '.join(map(str, KS))}", f"{protocols['knn']['seconds']:.1f} s"),
        (f"linear probe, {len(LEARNING_RATES)} rates", f"{protocols['linear']['seconds']:.1f} s"),
        ("bare model", f"{extraction['bare_images_per_second']:.0f} images/s"),
        ("extract", f"{extraction['extract_images_per_second']:.0f} images/s"),
        ("extract / bare model", f"{extraction['ratio']:.3f}"),
        ("the same in CPU seconds", f"{extraction['cpu_ratio']:.3f}"),
        *((f"peak memory, {count} images", f"{peak:.0f} MB") for count, peak in measured["memory"].items()),
    ]
    return "\n".join(f"{name:<32} {value:>16}" for name, value in rows)


def main(options: Options) -> None:
    """Measure, print, write."""
    torch.set_num_threads(options.threads)
    measured = {
        "model": options.model,
        "threads": options.threads,
        "protocols": measure_protocols(options),
        "extraction": measure_extraction(options),
        "memory": measure_memory(options),
    }
    print(show(measured))
    if options.out:
        options.out.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
