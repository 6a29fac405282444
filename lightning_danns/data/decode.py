"""One image file as 8-bit grey or RGB pixels, whatever its mode."""

from pathlib import Path

import numpy as np
from PIL import Image


class UnreadableImageError(Exception):
    """A file that is no image, is cut off, or has pixels of no known range; the text names it and the reason."""


def read_image(path: Path, channels: int = 3) -> Image.Image:
    """Decode a file to mode L (``channels=1``) or RGB (``channels=3``), each value from 0 to 255.

    Integers of 16 bits are divided by 257, so that white stays white. What is transparent shows black, since it sends
    no light. CMYK and palette images become RGB by Pillow's conversions.

    Raises:
        UnreadableImageError: see there.
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
