"""One cell: the commands that make and judge an encoder, and what came out of them.

The commands are those that anybody types. Each goes on where it was stopped, and so does a cell.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.cost import count_gflop, processor_name
from training.data.images import ImageSource
from training.evaluate.features import Features
from training.evaluate.split import hold_back
from training.miniature.study import (
    FINETUNED,
    JUDGED_IMAGES,
    LITE0,
    MODEL,
    NETWORKS,
    ON_TUNING_IMAGES,
    SHOTS,
    SUPERVISED,
    SUPERVISED_STAGES,
    TABLES,
    TRANSFER_FLAGS,
    TUNING_SHARE,
    Cell,
    evaluations,
)
from training.weights import read_recipe

TRAINING = Path(__file__).parents[1]
JUDGE = Path(__file__).with_name(SUPERVISED)
"""The supervised encoder of the committed results: learned anew, it is another judge."""
SPEED_WINDOW = 80
"""Steps: as many of each regularise the discriminator (every 16th), and lines of the log (every 20th) end there."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For each of several processes that learn, whatever the shell says: the number of threads decides bits."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "17179869184", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""For glibc: keep what a step frees for the next one. Giving it back costs an eighth of an adversarial step on CPU."""


class CellError(RuntimeError):
    """A cell that did not end; the message names the command."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a study runs."""

    data: Path
    """Folder of the archives of images."""
    fashion: Path
    """Folder of Fashion-MNIST's four idx files."""
    work: Path
    """Folder for runs, features and weights."""
    processes: int = 2
    """Of a pretraining run."""
    shorten: tuple[str, ...] = ()
    """Further flags of every pretraining run: a try of the study itself, not a result."""

    @property
    def train(self) -> Path:
        """Imagenette's training images."""
        return self.data / "imagenette-128-train.tar"

    @property
    def test(self) -> Path:
        """Imagenette's val images."""
        return self.data / "imagenette-128-val.tar"


def split_train(place: Place) -> tuple[Path, Path]:
    """Imagenette's training images in two tars, to learn from and to choose by; written once.

    Raises:
        FileNotFoundError: If there are no images.
    """
    fit, held = (place.work / f"tuning-{name}.tar" for name in ("train", "test"))
    if not (fit.exists() and held.exists()):
        source = ImageSource(place.train)
        labels = torch.tensor(source.labels)
        images = Features(torch.empty(len(source), 0), labels, tuple(source.classes))
        for file, numbers in zip((fit, held), hold_back(images, TUNING_SHARE, 0), strict=True):
            partial = file.with_name(f".partial_{file.name}")
            chosen = {source.name(index) for index in numbers.tolist()}
            with tarfile.open(place.train) as whole, tarfile.open(partial, "w") as part:
                for member in whole:
                    if member.name in chosen:
                        part.addfile(member, whole.extractfile(member))
            partial.replace(file)
    return fit, held


def learning(script: str, place: Place) -> list[str]:
    """The beginning of a command that learns, on as many processes as the place has for it."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(place.processes)] if place.processes > 1 else []
    return [sys.executable, *launcher, str(TRAINING / script)]


def pretraining(cell: Cell, place: Place) -> list[str]:
    """The command that trains a cell's autoencoder."""
    data = split_train(place)[0] if cell.part in ON_TUNING_IMAGES else place.train
    command = [*learning("pretrain.py", place), cell.method, "--data", str(data), "--model", MODEL]
    command += ["--out", cell.name, "--epochs", f"{cell.epochs:g}", "--seed", str(cell.seed)]
    command += ["--precision", TABLES[cell.part].precision]
    if cell.part not in ON_TUNING_IMAGES:
        command += ["--knn-data", str(place.test), "--knn-every", "5"]
    runtime = ["--workers", "0", "--cache-images", "--compile", "--grid-every", "0", "--resume", "auto"]
    return [*command, *cell.flags, *runtime, *place.shorten]


def learning_labels(stage: int, start: str, place: Place) -> list[str]:
    """The command of a stage of the supervised floor; `start` is what it begins with: random, or a file."""
    command = [*learning("evaluate.py", place), f"{MODEL}@{start}", "--protocols", "finetune", "--compile"]
    command += ["--train", str(place.train), "--test", str(place.test), *SUPERVISED_STAGES[stage]]
    return [*command, "--out", f"supervised-{stage}"]


def model_name(cell: Cell) -> str:
    """What `training/evaluate.py` calls the cell's encoder."""
    if cell.part != "floor":
        return f"{MODEL}@{cell.name}/encoder.safetensors"
    return {"pixels": "pixels:16", "supervised": f"{MODEL}@{SUPERVISED}"}.get(cell.arm, f"{MODEL}@random")


def evaluation(images: str, cell: Cell, place: Place) -> list[str]:
    """The command that judges a cell's encoder.

    Args:
        images: A name that `evaluations` gives.
        cell: Whose.
        place: Where.
    """
    own = [model_name(cell), "--out", f"{cell.name}/evaluation/{images}"]
    pair = ["--train", str(place.train), "--test", str(place.test)]
    alone = [sys.executable, str(TRAINING / "evaluate.py"), *own]
    frozen = ["--shots", *SHOTS, "--protocols", "knn", "linear", "few_shot"]
    if images == "tuning":
        fit, held = split_train(place)
        return [*alone, "--train", str(fit), "--test", str(held), "--protocols", "linear"]
    if images in FINETUNED:
        learner = learning("evaluate.py", place)
        return [*learner, *own, *pair, "--protocols", "finetune", "--compile", *FINETUNED[images]]
    if images == "dense":
        return [*alone, "--protocols", "segmentation", "detection", *dense_flags(place)]
    if images != "imagenette":
        train, test = transfer_sets(place)[images]
        return [*alone, "--train", str(train), "--test", str(test), *TRANSFER_FLAGS, *frozen]
    if not cell.method:
        return [*alone, *pair, *frozen]
    judged = ["--reconstruction.images", JUDGED_IMAGES, "--reconstruction.networks", *NETWORKS]
    return [*alone, *pair, *frozen, "reconstruction", *judged]


def transfer_sets(place: Place) -> dict[str, tuple[Path, Path]]:
    """Images to learn from and to be judged by, of other sets than Imagenette."""
    return {
        "cifar10": (place.data / "cifar10-train.tar.gz", place.data / "cifar10-test.tar.gz"),
        "fashion-mnist": (
            place.fashion / "train-images-idx3-ubyte.gz",
            place.fashion / "t10k-images-idx3-ubyte.gz",
        ),
    }


def dense_flags(place: Place) -> list[str]:
    """CamVid and BCCD, small enough for two cores."""
    segmentation = {"data": place.data / "camvid-240x180.tar", "void": 11, "size": "96 128", "width": 64, "epochs": 20}
    detection = {"data": place.data / "bccd-320x240.tar", "size": "96 128", "batch-size": 4, "lr": 1e-3, "epochs": 8}
    detection |= {"scales": "4 2 1", "width": 64, "head-width": 256, "proposals": 200, "sampled-boxes": 64}
    chosen = {"segmentation": segmentation, "detection": detection}
    return [
        part
        for protocol, flags in chosen.items()
        for name, value in flags.items()
        for part in (f"--{protocol}.{name}", *str(value).split())
    ]


def run(command: Sequence[str], work: Path) -> None:
    """Show a command and run it in the working folder.

    Raises:
        CellError: If it fails.
    """
    shown = " ".join(["python", *command[1:]])
    print(f"\n$ {shown}", flush=True)
    threads = ONE_THREAD if "torch.distributed.run" in command else {}
    code = subprocess.run(command, cwd=work, env=KEEP_MEMORY | os.environ | threads, check=False).returncode
    if code:
        raise CellError(f"code {code} of: {shown}")


def prepare_networks(place: Place) -> None:
    """Make the networks that reconstructions are judged by, where they are missing."""
    place.work.mkdir(parents=True, exist_ok=True)
    if not (place.work / LITE0).exists():
        run([sys.executable, str(TRAINING / "evaluate" / "lite0.py"), LITE0], place.work)
    if not (place.work / SUPERVISED).exists():
        shutil.copyfile(JUDGE if JUDGE.exists() else learn_supervised(place), place.work / SUPERVISED)


def learn_supervised(place: Place) -> Path:
    """Make the encoder that learns Imagenette's labels; returns its file, in float16."""
    start = "random"
    for stage in range(len(SUPERVISED_STAGES)):
        run(learning_labels(stage, start, place), place.work)
        (encoder,) = (place.work / f"supervised-{stage}" / "runs").glob("finetune-*/encoder.safetensors")
        start = str(encoder.relative_to(place.work))
    path = place.work / "learned.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(place.work / start).items()}, path)
    return path


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train and judge an encoder, going on where an earlier call was stopped.

    Returns:
        JSON-able: the cell, what its run was and cost, its curve, and every evaluation's `results.json`.

    Raises:
        CellError: If a command fails.
    """
    prepare_networks(place)
    folder = place.work / cell.name
    if cell.method:  # a run that has ended takes no step, but is held against the recipe
        run(pretraining(cell, place), place.work)
    found: dict[str, Any] = {"cell": asdict(cell), "evaluations": {}}
    for images in evaluations(cell):
        run(evaluation(images, cell, place), place.work)
        results = folder / "evaluation" / images / "results.json"
        found["evaluations"][images] = json.loads(results.read_text())
    return {**found, **(describe_run(folder) if cell.method else {}), "machine": describe_machine(place)}


def describe_run(folder: Path) -> dict[str, Any]:
    """Recipe, data, cost and curve of a finished run."""
    description = json.loads((folder / "recipe.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    gflop = sum(count_gflop(read_recipe(folder / "encoder.safetensors")).values())
    speed = usual_speed([(line["step"], line["images_per_second"]) for line in lines])
    images = lines[-1]["step"] * description["recipe"]["batch_size"]
    return {
        "recipe": description["recipe"],
        "data": description["data"],
        "versions": description["versions"],
        "cost": {"images": images, "seconds": images / speed, "images_per_second": speed, "gflop_per_image": gflop},
        "curve": [
            {"images": line["step"] * description["recipe"]["batch_size"], "knn": line["knn"]}
            for line in lines
            if "knn" in line
        ],
        "final_metrics": lines[-1],
    }


def usual_speed(lines: Sequence[tuple[int, float]], window: int = SPEED_WINDOW) -> float:
    """The speed that a tenth of a run reached: pauses, compiling and other work on the machine are not the method's.

    Args:
        lines: The step at which each line of a log was written, and the images a second since the line before.
        window: Steps, at least, that a speed is taken over: what a step does now and then counts in all alike.

    Returns:
        Images a second.
    """
    speeds: list[float] = []
    begun, before, seconds = 0, 0, 0.0  # seconds: of an image a step
    for step, speed in lines:
        seconds += (step - before) / speed
        before = step
        if step - begun >= window or (step == lines[-1][0] and not speeds):
            speeds.append((step - begun) / seconds)
            begun, seconds = step, 0.0
    return statistics.quantiles(speeds, n=10, method="inclusive")[-1] if len(speeds) > 1 else speeds[0]


def describe_machine(place: Place) -> dict[str, str]:
    """What decides the bits of a run besides versions: the processor, processes that learned, threads that judged."""
    return {
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processes": str(place.processes),
        "threads": str(torch.get_num_threads()),
    }
