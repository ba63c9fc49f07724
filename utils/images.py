"""Opening picture files with Pillow: known formats only, no more pixels than the limit, errors with file and size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from utils.limits import PIXELS

# no format whose reader starts another program (EPS starts Ghostscript) or reads a second file
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "SUN", "TIFF", "WEBP")
BYTES_A_PIXEL, OVERHEAD = 8, 2**24  # 16 bits a channel, not compressed, and what else a file holds


@contextmanager
def opened(path: Path, what: str = "picture", data: bytes | None = None) -> Iterator[Image.Image]:
    """The picture of a file (or of `data`, its bytes), its header read, its pixels not.

    Whatever is wrong, here or while the body reads the pixels, is an OSError that names the file: an unknown format,
    damage, more pixels than ASSISTANT_MAX_PIXELS.
    """
    if PIXELS.value > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = (PIXELS.value + 1) // 2  # Pillow's own limit is twice this
    if data is None:
        check_file(path, what)
    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=known_formats()) as image:
            PIXELS.check(image.width * image.height, f"{image.width} x {image.height} (width x height)")
            yield image
    except UnidentifiedImageError:
        known = ", ".join(known_formats())
        raise OSError(f"cannot read {what} {path}: damaged, or in no known format ({known})") from None
    except Image.DecompressionBombError as error:
        raise OSError(f"cannot read {what} {path}: {error} (set {PIXELS.name} to raise the limit)") from None
    except Exception as error:  # damaged files raise almost anything: struct.error, SyntaxError, KeyError, ...
        raise OSError(f"cannot read {what} {path}: {str(error) or type(error).__name__}") from None


@cache
def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_file(path: Path, what: str = "picture") -> None:
    """Raises an OSError unless `path` is a file that is no larger than a picture can be."""
    if not path.is_file():  # nor a device, a pipe, or a link to itself
        raise FileNotFoundError(f"no {what} {path}")
    size, most = path.stat().st_size, BYTES_A_PIXEL * PIXELS.value + OVERHEAD
    if size > most:
        raise OSError(
            f"cannot read {what} {path}: a file of {size} bytes, more than a picture of {PIXELS.value} pixels can have "
            f"(set {PIXELS.name} to raise that)"
        )
