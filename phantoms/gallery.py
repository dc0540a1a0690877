"""A picture of every phantom: ``python -m phantoms.gallery docs/images/phantoms.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

from phantoms.catalogue import PHANTOMS, Choice, render

__all__ = ["draw"]

SIZE = 320
WIDEST_MM = 440.0  # the thorax without its shoulders

# title, phantom, choice, height in mm, window
PANELS: list[tuple[str, str, Choice, float, tuple[float, float]]] = [
    ("chest, HU -1000 to 400", "chest", Choice(seed=55), 0.0, (-1000, 400)),
    ("abdomen, HU -160 to 240", "abdomen", Choice(seed=3), 50.0, (-160, 240)),
    ("head, HU -20 to 100", "head", Choice(seed=5), 8.0, (-20, 100)),
    ("FORBILD head, HU 0 to 100", "forbild-head", Choice(), 0.0, (0, 100)),
    ("brain, T1-weighted, 3 T", "brain", Choice(seed=5, sequence="t1", field=3.0), 8.0, (0, 0.45)),
    ("brain, T2-weighted", "brain", Choice(seed=5, sequence="t2", field=3.0), 8.0, (0, 0.6)),
    ("brain, FLAIR", "brain", Choice(seed=5, sequence="flair", field=3.0), 8.0, (0, 0.3)),
    ("ACR MR, resolution", "acr-mr", Choice(), 0.0, (0, 1)),
    ("ACR CT, module 1", "acr-ct", Choice(), -60.0, (-200, 200)),
    ("ACR CT, module 2, HU 80 to 104", "acr-ct", Choice(), -20.0, (80, 104)),
    ("ACR CT, module 4", "acr-ct", Choice(), 60.0, (0, 2600)),
    ("thorax after FORBILD, z = 60", "forbild-thorax", Choice(), 60.0, (-1000, 400)),
]


def draw(path: Path) -> None:
    """Write the picture.

    Args:
        path: a ``.png`` file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 4, figsize=(12, 9.6), facecolor="white")
    for axis, (title, name, choice, z, (low, high)) in zip(axes.flat, PANELS, strict=True):
        entry = PHANTOMS[name]
        made = entry.make(choice)
        field = min(entry.field_mm, WIDEST_MM)
        image = render(made, [z], (SIZE, SIZE), field / SIZE)[0]
        if entry.modality == "CT":
            image = image - 1000
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    draw(parser.parse_args().path)
