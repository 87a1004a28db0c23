# %% [markdown]
# Features of crops of two photographs: which crops are alike?
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from perceptual_mae_models import FeatureExtractor

# %%
photographs = [Image.fromarray(image) for image in load_sample_images().images]  # a palace and a flower
crops, origins = [], []
for origin, photograph in enumerate(photographs):
    for left in range(0, photograph.width - 160, 80):
        for top in range(0, photograph.height - 160, 80):
            crops.append(photograph.crop((left, top, left + 160, top + 160)))
            origins.append(origin)

# %%
extractor = FeatureExtractor("vit_pico_patch8_pmae", pool="avg")
features = torch.nn.functional.normalize(extractor(crops), dim=1)  # (N, 192)
similarity = features @ features.T  # (N, N), cosine
similarity.fill_diagonal_(-1)

# %%
origins = np.array(origins)
nearest = similarity.argmax(dim=1).numpy()
share = (origins[nearest] == origins).mean()
print(f"{share:.0%} of {len(crops)} crops have their nearest neighbour in the same photograph")
