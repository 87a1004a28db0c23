"""`pmae serve`: a page to try the models on."""

import argparse
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from perceptual_mae_models.commands.images import stream_features
from perceptual_mae_models.serve.hosts import is_loopback

if TYPE_CHECKING:
    from perceptual_mae_models.serve.neighbours import NeighbourIndex


def serve(arguments: argparse.Namespace) -> int:
    """`pmae serve`: serves the page until interrupted."""
    if find_spec("gradio") is None:
        raise RuntimeError("the page needs gradio: pip install -e '.[demo]' in the clone")
    index = _read_folder(arguments) if arguments.folder else None
    if not is_loopback(arguments.host):
        print(
            f"warning: {arguments.host} may be reached by other machines; the page has no password, and shows"
            + (f" small pictures and names of the images in {arguments.folder}" if index else " nothing of this one"),
            file=sys.stderr,
        )

    from perceptual_mae_models.features import default_device
    from perceptual_mae_models.serve.bench import Workbench
    from perceptual_mae_models.serve.page import build, launch
    from perceptual_mae_models.serve.samples import samples

    bench = Workbench(arguments.device or default_device(), index)
    launch(build(bench, samples()), arguments.host, arguments.port, names=arguments.name)
    return 0


def _read_folder(arguments: argparse.Namespace) -> "NeighbourIndex":
    from perceptual_mae_models.features import FeatureExtractor
    from perceptual_mae_models.images import find_images
    from perceptual_mae_models.serve.neighbours import NeighbourIndex

    files = find_images([arguments.folder])
    extractor = FeatureExtractor(arguments.model, device=arguments.device)
    return NeighbourIndex(extractor, stream_features(extractor, files, arguments), arguments.folder)
