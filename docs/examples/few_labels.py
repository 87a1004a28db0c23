# %% [markdown]
# Frozen features and a linear classifier: handwritten digits from ten labelled ones a class.
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from perceptual_mae_models import FeatureExtractor

# %%
digits = load_digits()
some = slice(0, 400)
images = [Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((64, 64)) for image in digits.images[some]]
extractor = FeatureExtractor("vit_pico_patch8_pmae", pool="cls+avg")
features = extractor(images).numpy()  # (400, 384)

# %%
labels = digits.target[some]
train, test = train_test_split(np.arange(len(labels)), train_size=100, stratify=labels, random_state=0)
classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
accuracy = classifier.fit(features[train], labels[train]).score(features[test], labels[test])
print(f"{accuracy:.1%} of {len(test)} digits, from {len(train)} labelled ones")
