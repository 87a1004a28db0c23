# %% [markdown]
# timm's own ways work: feature maps of several blocks, a class head, layer-wise learning rates.
import timm
import torch
from timm.optim import create_optimizer_v2

import perceptual_mae_models  # noqa: F401  (registers the encoders)

# %%
backbone = timm.create_model("vit_pico_patch8_pmae", pretrained=True, features_only=True, out_indices=(2, 5, 7))
images = torch.rand(2, 3, 64, 64)
for reduction, maps in zip(backbone.feature_info.reduction(), backbone(images), strict=True):
    print(f"1/{reduction} of the image: {tuple(maps.shape)}")  # (2, 192, 8, 8) each

# %%
classifier = timm.create_model("vit_pico_patch8_pmae", pretrained=True, num_classes=5, global_pool="avg")
optimizer = create_optimizer_v2(classifier, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
labels = torch.tensor([0, 3])
losses = []
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(classifier(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(" ".join(f"{loss:.2f}" for loss in losses))
assert losses[-1] < losses[0]
