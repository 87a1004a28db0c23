"""Loss curves of a run as a picture."""

import json
from pathlib import Path

_PANELS = {
    "autoencoder's loss": ("loss", "loss/"),
    "discriminator's loss": ("loss_d", "loss_d/"),
    "gradient norm": ("grad_norm", "grad_norm_d"),
    "logits, p of the augmentation": ("logits/", "ada_"),
    "accuracy of held-out images": ("knn",),
    "images per second": ("images_per_second",),
}


def save_curves(metrics: Path, path: Path) -> None:
    """Draw what `metrics.jsonl` says against the steps.

    Args:
        metrics: A run's `metrics.jsonl`.
        path: The PNG to write.
    """
    # a second, by which every run would begin later
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = list(dict.fromkeys(name for line in lines for name in line))
    panels = {title: [name for name in names if _shown(name, keys)] for title, keys in _PANELS.items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        for name in shown:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
        positive = all(line[name] > 0 for line in lines for name in shown if name in line)
        if positive and title.endswith(("loss", "norm")):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    FigureCanvasAgg(figure).print_png(str(path))


def _shown(name: str, keys: tuple[str, ...]) -> bool:
    return any(name == key or (key[-1] in "/_" and name.startswith(key)) for key in keys)
