"""Write tests/reference_mmcv: outputs of mmcv and mmsegmentation for two drawn images (see the README there)."""

import sys
from collections import deque
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.torch import save_file

sys.modules["mmcv.ops"] = MagicMock()  # compiled operators, which no transform uses

import mmcv  # noqa: E402
import mmseg.datasets.transforms.transforms as mm  # noqa: E402

SIZES = [(36, 48), (63, 84), (84, 112), (29, 39)]
# brightness, contrast, saturation, hue; None: left out
DRAWS = [
    (17.3, 1.47, None, None),
    (None, 0.53, None, None),
    (None, None, 0.51, None),
    (None, None, 1.49, None),
    (None, None, None, -18),
    (None, None, None, 17),
    (25.9, 0.77, 1.31, -7),
    (-12.1, 1.21, 0.83, 11),
]


class Prepared:
    "Stands for numpy.random in mmsegmentation: gives prepared numbers instead of random ones."

    def __init__(self, draws, contrast_first):
        brightness, contrast, saturation, hue = draws
        colours = [saturation, hue]
        steps = [brightness, *([contrast, *colours] if contrast_first else [*colours, contrast])]
        coins = [step is not None for step in steps]
        self.coins = deque([coins[0], contrast_first, *coins[1:]])
        self.values = deque(step for step in steps if step is not None)

    def randint(self, *bounds):
        return int(self.coins.popleft()) if bounds == (2,) else self.values.popleft()

    def uniform(self, low, high):
        return self.values.popleft()


def images():
    "A smooth drawing with hard edges, and noise, both 48 × 64, BGR."
    y, x = np.mgrid[:48, :64]
    drawn = np.stack([128 + 100 * np.sin(x / 9), 2.5 * x + y, 255 - 4 * y], 2)
    drawn[(x - 40) ** 2 + (y - 20) ** 2 < 150] = (20, 30, 230)
    noise = np.random.default_rng(14).integers(0, 256, (48, 64, 3))
    return {"drawn": np.clip(drawn, 0, 255).astype(np.uint8), "noise": noise.astype(np.uint8)}


def main():
    tensors = {}
    distortion = mm.PhotoMetricDistortion()
    labels = np.random.default_rng(2).integers(0, 20, (12, 16)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    tensors["mask"] = labels
    for height, width in SIZES:
        tensors[f"mask.{height}x{width}"] = mmcv.imresize(labels, (width, height), interpolation="nearest")
    for name, image in images().items():
        tensors[name] = mmcv.bgr2rgb(image)
        for height, width in SIZES:
            resized = mmcv.imresize(image, (width, height), interpolation="bilinear")
            tensors[f"{name}.{height}x{width}"] = mmcv.bgr2rgb(resized)
        for number, draws in enumerate(DRAWS):
            mm.random = Prepared(draws, contrast_first := number % 2 == 0)
            changed = distortion.transform({"img": image.copy()})["img"]
            tensors[f"{name}.colours{number}"] = mmcv.bgr2rgb(changed)
            assert not mm.random.coins and not mm.random.values, (draws, contrast_first)
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        if name == "drawn":
            tensors["drawn.normalised"] = mmcv.imnormalize(image[:8], mean, std, to_rgb=True)
    values = torch.tensor([[np.nan if draw is None else draw for draw in draws] for draws in DRAWS])
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    save_file(
        {**tensors, "draws": values.double()}, Path(__file__).with_name("reference_mmcv") / "pipeline.safetensors"
    )


if __name__ == "__main__":
    main()
