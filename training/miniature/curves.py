"""A picture of what features are worth while they are learned."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot

from training.miniature.choice import Results
from training.miniature.study import ARMS


def draw_curves(found: Results, path: Path) -> None:
    """k-NN of val images among each other, against images seen and against time, of the cells with equal epochs.

    Args:
        found: Results by their cells' names.
        path: The PNG to write.
    """
    figure = Plot(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, arm in enumerate(ARMS):
        first = True
        for result in found.values():
            if (result["cell"]["part"], result["cell"]["arm"]) != ("epochs", arm.name):
                continue
            knn = [100 * point["knn"] for point in result["curve"]]
            images = [point["images"] for point in result["curve"]]
            minutes = [count / result["cost"]["images_per_second"] / 60 for count in images]
            thousands = [count / 1000 for count in images]
            for axis, x in zip(axes, (thousands, minutes), strict=True):
                axis.plot(x, knn, color=f"C{number}", linewidth=1.2, marker=".", label=arm.name if first else None)
            first = False
    for axis, label in zip(axes, ("thousands of images seen", "minutes"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("k-NN accuracy, %")
    axes[0].legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
