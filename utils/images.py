"""Opening and reading image files: known formats only, a limit on pixels, errors that name the file; orientation."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from utils.limits import PIXELS

# No format whose reader starts another program (EPS starts Ghostscript) or reads a second file.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "SUN", "TIFF", "WEBP")
BYTES_PER_PIXEL = 8  # four channels of 16 bits, uncompressed
OVERHEAD = 2**24  # bytes of what else a file may hold
EXIF_ORIENTATION = 0x0112
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
TURNED = (5, 6, 7, 8)  # orientations that swap rows and columns
UPRIGHT = {  # orientation -> what turns the image as it is stored into the image as it is shown
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB as OpenCV reads it: EXIF orientation applied; 16 bit, palette, CMYK and grey converted; alpha
    dropped.

    Of an animation, the first frame. A missing, unreadable or truncated file, or one of more pixels than
    ASSISTANT_MAX_PIXELS, raises an OSError that names it; OpenCV alone would return a truncated JPEG with a grey end.
    """
    import cv2  # reading files needs it, answering about an image that is in memory does not

    path = Path(path)
    check_file(path)
    data = path.read_bytes()
    with open_image(path, data=data) as header:
        # OpenCV swaps red and blue of an AVIF with alpha and does not turn it; it multiplies a TIFF's colours by alpha
        if header.format == "AVIF" or (header.format == "TIFF" and header.has_transparency_data):
            return as_rgb(upright(header))
        _check_complete(header, data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise OSError(f"cannot read image {path}: {str(error).strip()}") from None
    if image is None:
        raise OSError(f"cannot read image {path}: OpenCV does not know its format, or it is damaged")
    return image


def as_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a PIL image, equal to what `read_image` makes of the same file.

    Of 16 bits the lower 8 are dropped; PIL's own conversion would make everything above 255 white. Raises ValueError
    for modes without an agreed range of values.
    """
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"an image of PIL mode {image.mode!r} has no agreed range of values; bring it to 0 .. 255 and uint8 "
            "first, or give the path of its file"
        )
    return np.asarray(image.convert("RGB"))


@contextmanager
def open_image(path: Path, what: str = "image", data: bytes | None = None) -> Generator[Image.Image]:
    """The image of a file (or of `data`, its bytes), with the header read and the pixels not yet.

    Whatever is wrong, here or while the block reads the pixels, is an OSError that names the file: an unknown format,
    damage, more pixels than ASSISTANT_MAX_PIXELS. what: the kind of image, for messages.
    """
    pillow_limit = Image.MAX_IMAGE_PIXELS
    if pillow_limit is not None and PIXELS.value > 2 * pillow_limit:  # Pillow refuses images of twice its limit
        Image.MAX_IMAGE_PIXELS = (PIXELS.value + 1) // 2
    if data is None:
        check_file(path, what)
    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=known_formats()) as image:
            PIXELS.check(image.width * image.height, f"{image.width} x {image.height} (width x height)")
            yield image
    except UnidentifiedImageError:
        formats = ", ".join(known_formats())
        raise OSError(f"cannot read {what} {path}: damaged, or in no known format ({formats})") from None
    except Image.DecompressionBombError as error:
        raise OSError(f"cannot read {what} {path}: {error} (set {PIXELS.name} to raise the limit)") from None
    except Exception as error:  # damaged files raise almost anything: struct.error, SyntaxError, KeyError, ...
        raise OSError(f"cannot read {what} {path}: {str(error) or type(error).__name__}") from None


@cache
def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_file(path: Path, what: str = "image") -> None:
    """OSError unless `path` is a file, and no larger than an image within the limit on pixels can be."""
    if not path.is_file():  # also refuses devices, pipes and links to themselves
        raise FileNotFoundError(f"no {what} {path}")
    size, most = path.stat().st_size, BYTES_PER_PIXEL * PIXELS.value + OVERHEAD
    if size > most:
        raise OSError(
            f"cannot read {what} {path}: a file of {size} bytes, more than an image of {PIXELS.value} pixels can have "
            f"(set {PIXELS.name} to raise that)"
        )


def _check_complete(image: Image.Image, data: bytes) -> None:
    """Raises an error of Pillow's if the file is truncated: it notices a missing end, OpenCV does not. JPEGs at 1/8
    size, for speed.

    A JPEG that ends with its end marker is whole: the two bytes cannot stand in coded pixels, and where a cut leaves
    those of a thumbnail in the header at the end, there is no pixel and OpenCV refuses the file.
    """
    if data.startswith(JPEG_START) and data.endswith(JPEG_END):
        return
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def orientation(path: Path) -> int:
    """The EXIF orientation of an image, 1 where there is none or it cannot be read."""
    try:
        with open_image(path) as image:
            return orientation_of(image)
    except OSError:
        return 1


def orientation_of(image: Image.Image) -> int:
    """The orientation in the EXIF block of an open image, which images are read by; 1 where there is none.

    Not Pillow's `getexif`, which also takes what XMP says: OpenCV does not. After the pixels of a TIFF are read it is
    1, because Pillow has turned them.
    """
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # the block may come after the pixels
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else exif
    value = tags.get(EXIF_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """An open image, label map or mask, turned as OpenCV turns images, so that files with one orientation agree."""
    if isinstance(image, TiffImageFile):
        image.filename = ""  # else Pillow maps the file, and mixes up the rows of an uncompressed one that is turned
    image.load()
    method = UPRIGHT.get(orientation_of(image))
    return image if method is None else image.transpose(method)


def size_mismatch(image: Path, what: str, mask: tuple[int, ...], shape: tuple[int, int]) -> str:
    """The message for a mask of size `mask` that belongs to an image of size `shape`, both (H, W)."""
    hint = orientation_hint(image, mask, shape)
    return f"{image}: the mask of {what} is {mask}, the image (H, W) {tuple(shape)}{hint}"


def orientation_hint(image: Path, mask: tuple[int, ...], shape: tuple[int, int]) -> str:
    """How an image's EXIF orientation explains a mask with swapped sides, and what to do; "" if it does not."""
    if mask != tuple(shape)[::-1] or (tag := orientation(image)) not in TURNED:
        return ""
    return (
        f"; the image is turned: its EXIF orientation is {tag}, and its annotations were made for the image as stored. "
        "Rotate the annotations as well, or remove the tag so that the image is shown as it is stored "
        "(exiftool -Orientation= FILE)"
    )
