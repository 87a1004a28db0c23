"""Perceptual MAE image encoders as timm models: importing this package registers them in timm.

```python
import perceptual_mae_models
import timm

model = timm.create_model("vit_pico_patch8_pmae", pretrained=True)
```
"""

from __future__ import annotations

import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .building import UnknownModelError
    from .features import FeatureExtractor
    from .images import ImageError
    from .unreadable import WeightsUnavailableError
    from .weights import CheckpointError

__all__ = ["CheckpointError", "FeatureExtractor", "ImageError", "UnknownModelError", "WeightsUnavailableError"]

# The `pmae` command passes here on its way to cli.py, and its help must not wait seconds for torch: its subcommands
# register the encoders themselves. Somebody's own program of that name lies elsewhere.
_program = Path(sys.argv[0] if sys.argv else "")
_scripts = Path(sysconfig.get_path("scripts"))
if _program.name not in ("pmae", "pmae.exe") or _program.resolve().parent != _scripts.resolve():
    from . import vision_transformer_pmae as vision_transformer_pmae

_MODULE_OF = {
    "CheckpointError": "weights",
    "FeatureExtractor": "features",
    "ImageError": "images",
    "UnknownModelError": "building",
    "WeightsUnavailableError": "unreadable",
}


def __getattr__(name: str) -> Any:
    # Reading images needs modules that most users of the encoders never touch; they are imported on first use.
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
