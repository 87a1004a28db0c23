"""The study as data: which methods, what is tried for each, how long they learn and what they are judged by.

`README.md` beside this file says why. A cell is one pretraining run with its evaluation: one JSON file of results.
"""

from dataclasses import dataclass
from typing import Literal

MODEL = "vit_pico_patch8_pmae"
"""64 x 64 pixels, 8 x 8 patches, 3.6 million parameters."""
TUNING_SHARE = 0.1
"""Of Imagenette's training images, each class in proportion: what is chosen is chosen on these."""
SHOTS = ("1", "5", "10")
"""Labelled images a class, for few-shot."""
SUPERVISED_STAGES = (
    ("--finetune.epochs", "15"),
    (
        *("--finetune.epochs", "8", "--finetune.batch-size", "64", "--finetune.layer-decay", "1"),
        *("--finetune.warmup-epochs", "0.5", "--finetune.mixup", "0", "--finetune.cutmix", "0"),
        *("--finetune.augment", "", "--finetune.random-erase", "0"),
    ),
)
"""Of the floor that learns labels, the encoder of the front page: pico's own recipe, then plain crops and flips."""
LITE0, SUPERVISED = "lite0.safetensors", "supervised.safetensors"
"""In the working folder, in which commands run: the networks that judge reconstructions. The second is a floor too."""
NETWORKS = (f"tf_efficientnet_lite0@{LITE0}", f"{MODEL}@{SUPERVISED}")
"""What evaluations call them."""
NETWORK_NAMES = dict(zip(NETWORKS, ("Lite0", "supervised"), strict=True))
"""What tables call them."""
JUDGED_IMAGES = "2000"
"""Of val, that reconstructions are judged on: the networks that judge them cost more than all else together."""
TRANSFER_FLAGS = ("--train-images", "10000", "--test-images", "5000")
"""Of CIFAR-10 and Fashion-MNIST: what two cores can afford, evenly spaced over the classes."""
FEW_LABELS = "imagenette-100"
"""The evaluation that learns from 100 labelled images, nine to eleven a class, and nothing else."""
FINETUNED = {
    "finetune": ("--finetune.epochs", "10", "--finetune.precision", "bf16"),
    FEW_LABELS: (
        *("--train-images", "100", "--finetune.epochs", "300"),
        *("--finetune.batch-size", "20", "--finetune.precision", "bf16"),
    ),
}
"""Evaluations that fine-tune on Imagenette, by name."""
CLOCK = "mae"
"""Whose time all methods get where they are compared at equal time."""

FROZEN = ("tuning", "imagenette", "cifar10", "fashion-mnist")
"""Evaluations of frozen features."""
FLOORS = {
    "pixels": FROZEN,
    "random": FROZEN,
    "supervised": FROZEN[1:],  # it has learned the labels of the tuning images
    "scratch": (FEW_LABELS,),
}
"""What nobody pretrained, with its evaluations: the image itself, first weights, the encoder that learns Imagenette's
labels, and that which has no more than `FEW_LABELS` to learn from."""

ON_TUNING_IMAGES = ("tune", "remedy")
"""Parts whose cells learn from nine tenths of the training images and are judged on the last tenth."""

Part = Literal["floor", "tune", "remedy", "epochs", "cause", "clock", "long"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the tables."""

    name: str
    method: str
    """Of `training/pretrain.py`; its values for the model, where nothing else is said."""
    flags: tuple[str, ...] = ()
    """What makes it differ from the method; said after the weights taken, so that they win."""
    trials: tuple[tuple[str, ...], ...] = ((),)
    """Sets of flags, of which the best on the tuning images is taken; a single one is not tried."""
    tried_with: str = ""
    """The arm whose trials decide, where that is another."""
    control: bool = False
    """Not one of the paper's methods."""


WEIGHTS = (
    (),  # the release's: d_f 0.05, d_s 40, w_adv 0.7
    ("--feature-weight", "0.5", "--adversarial-weight", "0.1", "--r1-gamma", "1"),
    ("--feature-weight", "1", "--adversarial-weight", "0.01", "--r1-gamma", "1"),
    ("--feature-weight", "1", "--style-weight", "0", "--adversarial-weight", "0.1", "--r1-gamma", "1"),
)
"""Tried with the first adversarial method, the cheapest; as in the release, all three have the same."""

ARMS = (
    Arm(name="mae", method="mae"),
    Arm(name="ms_ssim", method="ms_ssim"),
    Arm(name="ls_gan_p", method="ls_gan_p", trials=WEIGHTS),
    Arm(name="msg_gan_p", method="msg_gan_p", trials=WEIGHTS, tried_with="ls_gan_p"),
    Arm(name="stylegan2_ada_p", method="stylegan2_ada_p", trials=WEIGHTS, tried_with="ls_gan_p"),
    Arm(name="mae_pixels", method="mae", flags=("--no-norm-pix-loss",), control=True),
    Arm(
        name="l1_image",
        method="mae",
        flags=("--no-norm-pix-loss", "--reconstruction", "l1", "--loss-on", "image"),
        control=True,
    ),
)

HIDDEN = ("--loss-on", "hidden", "--paste-visible")
"""Nothing is learned of patches that the encoder has seen."""
REMEDIES = (
    Arm(name="mae", method="mae", control=True),
    Arm(name="l1_image", method="mae", flags=ARMS[-1].flags, control=True),
    Arm(name="hidden", method="ls_gan_p", flags=HIDDEN, trials=WEIGHTS, tried_with="ls_gan_p"),
    Arm(
        name="hidden_norm",
        method="ls_gan_p",
        flags=(*HIDDEN, "--norm-pix-loss", "--reconstruction", "l2"),
        trials=WEIGHTS,
        tried_with="ls_gan_p",
    ),
    Arm(name="snapshot", method="ls_gan_p", flags=("--phi", "snapshot"), trials=WEIGHTS, tried_with="ls_gan_p"),
)
"""What may help `ls_gan_p`, with the weights taken for it, and the controls it is to be held against."""

LABELLED_PHI = "labelled_phi"
"""No method: it shows what better features would give."""
CAUSES = (
    Arm(
        name="no_features",
        method="ls_gan_p",
        flags=("--feature-weight", "0", "--style-weight", "0"),
        trials=WEIGHTS,
        tried_with="ls_gan_p",
    ),
    Arm(
        name="no_adversary",
        method="ls_gan_p",
        flags=("--adversarial-weight", "0"),
        trials=WEIGHTS,
        tried_with="ls_gan_p",
    ),
    Arm(
        name=LABELLED_PHI,
        method="ls_gan_p",
        flags=("--phi", "timm:tf_efficientnet_lite0", "--phi-file", LITE0),
        trials=WEIGHTS,
        tried_with="ls_gan_p",
    ),
)
"""`ls_gan_p` without one of its terms, and with features of a network that has learned labels: which part does what."""
BETWEEN = ("l1_image", "ls_gan_p")
"""The arms of equal epochs that have neither and both of the terms."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A comparison: every arm, so many times."""

    title: str
    epochs: float
    numbers: int
    """Cells of an arm: its seeds; while tuning, its trials."""
    controls: bool = True
    """Whether controls take part."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of pretraining."""


TABLES: dict[Part, Table] = {
    "tune": Table(title="Tuning", epochs=10, numbers=len(WEIGHTS), controls=False, precision="fp32"),
    "remedy": Table(title="Remedies", epochs=10, numbers=1, precision="fp32"),
    "epochs": Table(title="Equal epochs", epochs=30, numbers=3),
    "cause": Table(title="What each term does", epochs=30, numbers=1),
    "clock": Table(title="Equal time", epochs=30, numbers=1, controls=False),
    "long": Table(title="Long runs", epochs=100, numbers=1),
}
"""In the order in which they are run, the first seed of all before the second of any."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pretraining run with its evaluation."""

    part: Part
    arm: str
    number: int
    """The seed; while tuning, the trial, whose seed is 0."""
    method: str = ""
    """Of `training/pretrain.py`; empty for floors."""
    flags: tuple[str, ...] = ()
    epochs: float = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.part}-{self.arm}-{self.number}"

    @property
    def seed(self) -> int:
        """Decides order, crops and masks, the same for every arm, and first weights.

        The encoder's are the same for arms whose decoder has one scale: one of several scales draws more in between.
        """
        return 0 if self.part in ON_TUNING_IMAGES else self.number


EVALUATIONS: dict[Part, tuple[str, ...]] = {
    "tune": ("tuning",),
    "remedy": ("tuning",),
    "epochs": ("imagenette",),
    "cause": ("imagenette",),
    "clock": ("imagenette",),
    "long": ("tuning", "imagenette", "finetune", FEW_LABELS, "cifar10", "fashion-mnist", "dense"),
}
"""Of a cell by its part, floors aside, see `cells.py`."""


def evaluations(cell: Cell) -> tuple[str, ...]:
    """What a cell is judged on."""
    return FLOORS[cell.arm] if cell.part == "floor" else EVALUATIONS[cell.part]
