"""Images in, features out: any timm encoder as a function from files, Pillow images or arrays to a tensor.

```python
from perceptual_mae_models.features import FeatureExtractor

extractor = FeatureExtractor("vit_pico_patch8_pmae")
features = extractor(["cat.jpg", "dog.png"])                 # (2, 192), float32, on the CPU

for batch in extractor.stream(find_images(["photos"])):      # any number of images in the memory of one batch
    ...
```
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from perceptual_mae_models.building import UnknownModelError as UnknownModelError
from perceptual_mae_models.building import build, name_origin
from perceptual_mae_models.images import ImageError, ImageInput
from perceptual_mae_models.loading import Loaded, Transform, load_here, load_in_workers
from perceptual_mae_models.version import __version__

Pool = Literal["avg", "cls", "cls+avg", "tokens", "map"]
Precision = Literal["float32", "bfloat16", "float16"]

POOLS: tuple[Pool, ...] = ("avg", "cls", "cls+avg", "tokens", "map")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
DEFAULT_MODEL = "vit_pico_patch8_pmae"


@dataclass(frozen=True)
class FeatureBatch:
    """What `FeatureExtractor.stream` yields.

    Attributes:
        names: One name an image; see `images.image_name`.
        features: Float32 on the CPU, one row a name; shapes as for `FeatureExtractor`.
        broken: The images among these that could not be read; they have neither name nor row.
    """

    names: tuple[str, ...]
    features: Tensor
    broken: tuple[ImageError, ...]


class FeatureExtractor:
    """A timm encoder with its own transform.

    Pooling, of what `model.forward_features` returns (after the final norm):

    - `avg`: mean of the patch tokens, prefix tokens left out, (N, D);
    - `cls`: the class token, (N, D);
    - `cls+avg`: both in that order, (N, 2 * D);
    - `tokens`: all tokens, prefix tokens first, (N, L, D);
    - `map`: the patch tokens on their grid, (N, D, H, W).

    Pooled vectors pass through the model's `fc_norm` or `head.norm` where it has one, which is its final norm then.
    Models without tokens (convolutional ones) have no prefix: their feature map is their patch tokens. What a model
    does not say (which tokens are patches, how they lie) is not guessed: an error says which pooling it can have.

    The transform is the one of the model's configuration: resize, centre crop, mean and standard deviation.

    Reduced precision is autocast: weights, the residual stream and norms stay float32 and only the matrix products are
    rounded, which is nearer to float32 than a cast model is and as fast on a GPU.

    Attributes:
        model: The encoder, in evaluation mode on `device`.
        transform: From an RGB `PIL.Image` to a normalised (3, H, W) float tensor.
        input_size: (H, W) in pixels.
        metadata: What produced the features, as strings: model, tag (empty unless these are its published weights),
            weights ("pretrained", "random", "module", a checkpoint's name, or the id they came from), pool, image
            size, dtype and the version of this package.
    """

    def __init__(
        self,
        model: str | nn.Module = DEFAULT_MODEL,
        pool: Pool = "avg",
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype = "float32",
        checkpoint: str | Path | None = None,
        pretrained: bool = True,
    ) -> None:
        """Builds the encoder.

        Args:
            model: A timm name (`arch` or `arch.tag`), an `hf-hub:` or `local-dir:` id, or a timm module that is built
                already; the module itself is moved to `device` and put in evaluation mode. Of a compiled module the
                original computes, since compiling covers its `forward` alone.
            pool: See the class.
            device: By default a module's own device, and for a name "cuda" where there is one, else "cpu".
            dtype: "float32", "bfloat16" or "float16" arithmetic, by name or torch's own. Features are float32 whichever
                it is.
            checkpoint: A weights file, or the folder of a run, to load in place of the published weights.
            pretrained: False leaves the weights random, unless there is a checkpoint.

        Raises:
            UnknownModelError: timm has no model or tag of this name.
            FileNotFoundError: There is no such checkpoint.
            ValueError: An argument is not one of its choices, the model has no class token to pool or does not say
                which tokens are patches, this torch does not know the device, or a given module says nothing about
                its transform, has no `forward_features`, takes no RGB images, or comes with a checkpoint.
        """
        if pool not in POOLS:
            raise ValueError(f"pool is one of {', '.join(POOLS)}, not {pool!r}")
        precision = str(dtype).removeprefix("torch.")
        if precision not in PRECISIONS:
            raise ValueError(f"dtype is one of {', '.join(PRECISIONS)}, not {dtype!r}")
        # Any: what timm adds to nn.Module (pretrained_cfg, forward_features, ...) has no type.
        self.model: Any = build(model, checkpoint, pretrained)
        architecture = str(self.model.pretrained_cfg.get("architecture") or type(self.model).__name__)
        _check_pool(pool, self.model, architecture)
        if device is None:
            device = _own_device(self.model) if isinstance(model, nn.Module) else default_device()
        self.device = find_device(device)
        self.model.to(self.device).eval()
        self.pool: Pool = pool
        self.dtype = precision

        data_config = resolve_model_data_config(self.model)  # type: ignore[no-untyped-call]
        # The configuration speaks of the pretrained weights; a model built with another img_size takes only that one.
        built_for = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        if built_for is not None:
            data_config["input_size"] = (3, *built_for)
        self.input_size: tuple[int, int] = tuple(data_config["input_size"][1:])
        self.transform: Transform = create_transform(**data_config)
        self.metadata = self._describe(architecture, name_origin(model, checkpoint, pretrained))

    def _describe(self, architecture: str, weights: str) -> dict[str, str]:
        cast = self._weights_dtype != torch.float32
        return {
            "model": architecture,
            "tag": str(self.model.pretrained_cfg.get("tag") or "") if weights == "pretrained" else "",
            "weights": weights,
            "pool": self.pool,
            "image_size": "x".join(map(str, self.input_size)),
            "dtype": str(self._weights_dtype).removeprefix("torch.") if cast else self.dtype,
            "perceptual_mae_models": __version__,
        }

    @cached_property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one image's features: (D,), (L, D) or (D, H, W)."""
        return tuple(self.encode(torch.zeros(1, 3, *self.input_size)).shape[1:])

    def __call__(self, images: ImageInput | Iterable[ImageInput], batch_size: int = 64, workers: int = 0) -> Tensor:
        """Computes the features of all images.

        Args:
            images: One image or several: paths, Pillow images, arrays; see `images.open_image`.
            batch_size: Images a forward pass; it decides memory and speed, not the result.
            workers: Processes that decode, 0 for none; images that Pillow has opened are decoded here, because
                processes would share their files.

        Returns:
            Float32 on the CPU, a row an image in the given order: (N, D), (N, L, D) or (N, D, H, W).

        Raises:
            ImageError: An image cannot be read.
            ValueError: No images, or an impossible number of workers or images a batch.
        """
        rows = [batch.features for batch in self.stream(images, batch_size, workers)]
        if not rows:
            raise ValueError("no images")
        return torch.cat(rows)

    def stream(
        self,
        images: ImageInput | Iterable[ImageInput],
        batch_size: int = 64,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> Iterator[FeatureBatch]:
        """Computes features batch by batch, in order, holding one batch (and with workers, two each) in memory.

        Args:
            images: As for calling; a generator is read as it is needed, with workers two batches each ahead.
            batch_size: As for calling.
            workers: As for calling.
            skip_broken: Report unreadable images in `FeatureBatch.broken` rather than raising.

        Yields:
            A `FeatureBatch` for each `batch_size` images; fewer rows where images are broken, perhaps none.

        Raises:
            ImageError: The first image that cannot be read, unless `skip_broken`.
            ValueError: As for calling.
        """
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size is at least 1 and workers at least 0, not {batch_size} and {workers}")
        if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # of names, as our own files hold them
            images = images.ravel().tolist()
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        if workers == 0:
            return self._encode_all(load_here(images, batch_size, self.transform), skip_broken)
        return self._encode_all(load_in_workers(images, batch_size, self.transform, workers), skip_broken)

    def _encode_all(self, batches: Iterable[Loaded], skip_broken: bool) -> Iterator[FeatureBatch]:
        for batch in batches:
            if batch.broken and not skip_broken:
                raise batch.broken[0]
            pixels = torch.from_numpy(batch.pixels)
            features = self.encode(pixels) if batch.names else torch.empty(0, *self.feature_shape)
            yield FeatureBatch(batch.names, features, batch.broken)

    @torch.no_grad()  # not inference_mode: a classifier may be trained on the features
    def encode(self, pixels: Tensor) -> Tensor:
        """Computes the features of transformed images.

        Args:
            pixels: (N, 3, H, W), what `transform` returns.

        Returns:
            Float32 on the CPU: (N, D), (N, L, D) or (N, D, H, W).

        Raises:
            ValueError: The model gives several sets of features at once, or does not say how its tokens lie.
        """
        precision = getattr(torch, self.dtype)
        with torch.autocast(self.device.type, dtype=precision, enabled=precision != torch.float32):
            encoded = self.model.forward_features(pixels.to(self.device, self._weights_dtype))
            if not isinstance(encoded, Tensor):
                raise ValueError(f"{self.metadata['model']} gives several sets of features, none of which is its own")
            return self._pool(encoded.float(), pixels).float().cpu()

    @property
    def _weights_dtype(self) -> torch.dtype:
        parameter = next(self.model.parameters(), None)
        return torch.float32 if parameter is None else parameter.dtype

    def _grid(self, encoded: Tensor, prefix: int, pixels: Tensor) -> tuple[int, int]:
        if encoded.ndim == 4:
            height, width = encoded.shape[1:3] if self._channels_last else encoded.shape[2:]
            return height, width
        measure = getattr(getattr(self.model, "patch_embed", None), "dynamic_feat_size", None)
        height, width = measure(pixels.shape[2:]) if measure else (0, 0)
        if height * width != encoded.shape[1] - prefix:
            raise ValueError(f"{self.metadata['model']} does not say how its tokens lie; use pool='tokens'")
        return height, width

    @property
    def _channels_last(self) -> bool:
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def _pool(self, encoded: Tensor, pixels: Tensor) -> Tensor:
        maps, prefix = encoded, 0
        if encoded.ndim == 3:
            prefix = getattr(self.model, "num_prefix_tokens", 0)
        elif self._channels_last:
            encoded = encoded.flatten(1, 2)
        else:
            encoded = encoded.flatten(2).transpose(1, 2)

        if self.pool == "tokens":
            return encoded
        if self.pool == "map":
            return encoded[:, prefix:].transpose(1, 2).reshape(len(encoded), -1, *self._grid(maps, prefix, pixels))
        vectors = {"cls": lambda: encoded[:, 0], "avg": lambda: encoded[:, prefix:].mean(dim=1)}
        return torch.cat([self._normalise(vectors[part](), maps.ndim) for part in self.pool.split("+")], dim=1)

    def _normalise(self, vectors: Tensor, ndim: int) -> Tensor:
        """The final norm of pooled vectors (N, D), of a model that pools before it."""
        if (norm := getattr(self.model, "fc_norm", None)) is None:
            norm = getattr(getattr(self.model, "head", None), "norm", None)
            width = getattr(getattr(norm, "weight", None), "shape", None)
            if norm is None or width != vectors.shape[1:]:  # of another width: between the layers of a head
                return vectors
        vectors = vectors.to(getattr(getattr(norm, "weight", None), "dtype", vectors.dtype))  # of a cast module
        if ndim == 4 and not self._channels_last:  # it is made for maps
            vectors = vectors[:, :, None, None]
        pooled: Tensor = norm(vectors)
        return pooled.flatten(1)


def default_device() -> str:
    """Names the device that features are computed on unless another is asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: This torch, or this machine, has no such device.
    """
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # the second of kinds that it was built without
        raise ValueError(f"no device {str(name)!r}: {str(error).splitlines()[0]}") from error


def _check_pool(pool: Pool, model: nn.Module, architecture: str) -> None:
    has_class_token = getattr(model, "cls_token", None) is not None
    if "cls" in pool and not has_class_token:
        raise ValueError(f"{architecture} has no class token; use pool='avg'")
    # Some (volo, pit) have a class token and do not count it: their patches cannot be told from it.
    if pool not in ("cls", "tokens") and has_class_token and not hasattr(model, "num_prefix_tokens"):
        raise ValueError(f"{architecture} does not say which of its tokens are patches; use pool='cls' or 'tokens'")


def _own_device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
