"""From one image file, whatever its mode, to pixels in [0, 1]."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_danns.errors import UsageError


class UnreadableImageError(Exception):
    """A file that is no image, is cut off, or has pixels of no known range; the text names it and the reason."""


def read_image(path: Path, channels: int = 3) -> Image.Image:
    """Decode a file to mode L (``channels=1``) or RGB (``channels=3``), each value from 0 to 255.

    Integers of 16 bits are divided by 257, so that white stays white. What is transparent shows black, since it sends
    no light. CMYK and palette images become RGB by Pillow's conversions. Raises `UnreadableImageError`.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = file
            if image.mode.startswith("I"):
                image = _to_8_bits(image)
            elif image.mode == "F":
                raise ValueError("pixels are floating-point numbers of unknown range")
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        raise UnreadableImageError(f"{path} ({' '.join(str(error).split()) or type(error).__name__})") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} are no 16-bit integers")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))  # rounded


def to_pixels(transform: Callable[[Any], Any], image: Image.Image, path: Path) -> Tensor:
    """Transform an image to float32 (C, H, W) in [0, 1]; a `UsageError` names the step that makes something else."""
    state = torch.get_rng_state()
    result = transform(image)
    if isinstance(result, Image.Image):
        result = v2.functional.pil_to_tensor(result)
    wrong = fault(result)
    if not wrong:
        pixels = result.as_subclass(Tensor)
        return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()
    torch.set_rng_state(state)  # so that each step does again what it did
    culprit, value = transform, image
    for step in transform.transforms if isinstance(transform, v2.Compose) else []:
        value = step(value)
        if isinstance(value, Tensor) and value.is_floating_point() and fault(value):
            culprit = step
            break
    raise UsageError(
        f"{culprit} {wrong} ({path}). Networks under Dale's principle take pixels in [0, 1]: leave out what subtracts "
        "or goes beyond them, since their layers centre and scale by themselves; v2.ToDtype(torch.float32, scale=True) "
        "maps bytes to [0, 1]"
    )


def fault(result: Any) -> str:
    """What is wrong with transformed pixels (..., C, H, W), or nothing."""
    if not isinstance(result, Tensor):
        return f"gives a {type(result).__name__}, not an image or a tensor"
    if result.ndim < 3:
        return f"gives the shape {tuple(result.shape)}, not (channels, height, width)"
    if result.dtype == torch.uint8:
        return ""
    if not result.is_floating_point():
        return f"gives {result.dtype}"
    low, high = (value.item() for value in result.aminmax())
    if low < 0:
        return f"makes pixels negative, down to {low:.3g}"
    if math.isnan(low):
        return "makes pixels NaN"
    return "" if high <= 1 + 1e-5 else f"makes pixels greater than 1, up to {high:.3g}"
