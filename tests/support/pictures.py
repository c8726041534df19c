"""Random pictures."""

import numpy as np
from PIL import Image


def picture(rng, height=20, width=12):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
