"""Folders of random pictures."""

import numpy as np
from PIL import Image


def fill(folder, per_class=10, size=(8, 8), mode="RGB", classes=("cat", "dog"), seed=0):
    """Write PNG files to a folder for each class."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for at in range(per_class):
            shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
            values = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(values, mode).save(folder / name / f"{at}.png")
