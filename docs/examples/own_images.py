# %% [markdown]
# A pretraining run on a folder of images, far too short to learn much, and its encoder in timm. From a clone.
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
from PIL import Image
from sklearn.datasets import load_sample_images

import perceptual_mae_models  # noqa: F401  (registers the encoders)

# %%
work = Path(tempfile.mkdtemp())
(work / "photos").mkdir()
for number, image in enumerate(load_sample_images().images):
    for left in range(0, 600, 100):
        Image.fromarray(image).crop((left, 0, left + 200, 200)).save(work / "photos" / f"{number}-{left}.png")

# %%
recipe = ["mae", "--model", "vit_pico_patch8_pmae", "--steps", "3", "--batch-size", "8", "--workers", "0"]
places = ["--data", str(work / "photos"), "--out", str(work / "run"), "--grid-every", "0"]
subprocess.run([sys.executable, "training/pretrain.py", *recipe, *places], check=True)

# %%
overlay = {"file": str(work / "run" / "encoder.safetensors")}
model = timm.create_model("vit_pico_patch8_pmae", pretrained=True, pretrained_cfg_overlay=overlay)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, pretrained on your images")
