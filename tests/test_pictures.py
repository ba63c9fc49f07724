"""Image files that ask for too much, end early, lead nowhere, or are of formats whose readers do more than read."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources.base import image_size
from data.sources.coco import read_segments
from data.sources.semantic import pair_files, read_label_map
from data.views import ClipView, PaddedView, SamView
from utils.images import check_file, known_formats, open_image, read_image

READERS = (read_image, image_size, read_label_map, lambda path: read_segments(path, (4, 4)))


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A grey PNG whose header says these sides, whatever its rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows or b"\0")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def gif(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\0\0\0,\0\0\0\0"
        + struct.pack("<HH", width, height)
        + b"\0\2\1\0\0;"
    )


def jpeg(width: int, height: int) -> bytes:
    frame = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", height, width) + b"\3\1\x11\0\2\x11\1\3\x11\1"
    return b"\xff\xd8" + frame + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0?\0"


BOMBS = {
    "png": png(100_000, 100_000),
    "tall.png": png(1, 2**31 - 1),
    "bmp": bmp(100_000, 100_000),
    "gif": gif(65_535, 65_535),
    "pgm": b"P5 100000 100000 255\n",
    "jpg": jpeg(65_535, 65_535),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_asks_for_gigabytes_is_refused(name, read, tmp_path):
    path = tmp_path / f"bomb.{name}"
    path.write_bytes(BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=rf"bomb\.{name}.*pixels.*ASSISTANT_MAX_PIXELS"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_the_limit_is_adjustable(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setenv("ASSISTANT_MAX_PIXELS", "1199")
    with pytest.raises(OSError, match=r"a\.png: 40 x 30 .width x height.: 1200 pixels, more than the limit of 1199"):
        read_image(tmp_path / "a.png")
    monkeypatch.setenv("ASSISTANT_MAX_PIXELS", "1200")
    assert read_image(tmp_path / "a.png").shape == (30, 40, 3)
    monkeypatch.setenv("ASSISTANT_MAX_PIXELS", str(2**40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    (tmp_path / "large.bmp").write_bytes(bmp(20_000, 20_000))
    assert image_size(tmp_path / "large.bmp") == (20_000, 20_000)


def test_a_file_too_large_to_be_a_picture_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(BOMBS["png"])
        file.truncate(2**40)  # no block of it is on the disk
    for read in READERS:
        with pytest.raises(OSError, match=r"huge\.png: a file of 1099511627776 bytes"):
            read(tmp_path / "huge.png")


def test_links_to_themselves_pipes_devices_and_folders_are_no_pictures(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for read in READERS:
        for name in ("loop", "pipe", "folder", "device"):
            with pytest.raises(FileNotFoundError, match=rf"no .*{name}\.png"):
                read(tmp_path / f"{name}.png")


def test_folders_that_link_back_to_themselves_are_walked_once(tmp_path):
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (tmp_path / kind / "a").mkdir(parents=True)
        (tmp_path / kind / "a" / f"x.{ending}").touch()
        (tmp_path / kind / "a" / "up").symlink_to("..")
        (tmp_path / kind / "a" / "here").symlink_to(".")
        (tmp_path / kind / "b").symlink_to("a")  # no loop: its files count
    rows = pair_files(tmp_path / "images", tmp_path / "masks").rows
    assert [rows[index] for index in range(len(rows))] == [["a/x.jpg", "a/x.png"], ["b/x.jpg", "b/x.png"]]


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + bytes(99), b"no", b""]
)
def test_formats_with_powerful_readers_are_not_tried(head, tmp_path):
    """Pillow would hand EPS to Ghostscript."""
    (tmp_path / "x.png").write_bytes(head)
    assert not {"EPS", "WMF", "PSD", "FITS"} & set(known_formats()) and {"PNG", "JPEG", "WEBP"} < set(known_formats())
    for read in READERS:
        with pytest.raises(OSError, match=r"cannot read .*x\.png: damaged, or in no known format"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tif", "avif"])
def test_every_cut_of_a_file_is_an_error_or_the_whole_picture(ending, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    image.save(tmp_path / f"x.{ending}")
    data, whole = (tmp_path / f"x.{ending}").read_bytes(), read_image(tmp_path / f"x.{ending}")
    for end in (0, 1, 9, 30, len(data) // 2, len(data) - 40):
        (tmp_path / f"cut.{ending}").write_bytes(data[:end])
        try:
            assert np.array_equal(read_image(tmp_path / f"cut.{ending}"), whole)
        except OSError as error:
            assert f"cut.{ending}" in str(error)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_are_an_error_that_names_the_file(seed, tmp_path):
    rng = np.random.default_rng(seed)
    kind = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "PPM", "AVIF")[seed % 9]
    held = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(held, kind)
    data = np.frombuffer(held.getvalue(), np.uint8).copy()
    places = rng.integers(0, min(len(data), 200), 6)
    data[places] = rng.integers(0, 256, 6)
    (tmp_path / "x.img").write_bytes(data.tobytes())
    for read in READERS[:2]:
        try:
            read(tmp_path / "x.img")
        except OSError as error:
            assert "x.img" in str(error)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_picture_counts(kind, tmp_path):
    frames = [Image.new("RGB", (40, 24), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    frames[0].save(tmp_path / "x.img", kind, save_all=True, append_images=frames[1:])
    image = read_image(tmp_path / "x.img")
    assert image.shape == (24, 40, 3) and image[..., 0].min() > 200 and image[..., 2].max() < 50


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 9000), (9000, 3)])
def test_an_extreme_shape_needs_no_memory(shape):
    """60000 x 1 resized whole to a shortest side of 336 would be 20 GB."""
    image = np.zeros((*shape, 3), np.uint8)
    image[:] = (10, 100, 200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = ClipView(336)(image)
    padded, (seg, geometry) = PaddedView(336)(image), SamView(256)(image)
    assert pixels.shape == padded.shape == (3, 336, 336) and seg.shape == (3, 256, 256)
    assert geometry.original == shape and max(geometry.resized) == 256 and min(geometry.resized) >= 1
    assert all(len(plane.unique()) == 1 for plane in pixels)  # of one colour, to the edges
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


@pytest.mark.parametrize("shape", [(6, 300), (300, 7)])
def test_cropping_first_gives_what_cropping_last_does(shape, monkeypatch):
    rows = np.linspace(0, 255, shape[0] * shape[1] * 3).reshape(*shape, 3).astype(np.uint8)
    last = ClipView(28)(rows)
    monkeypatch.setattr("data.views.CROP_FIRST", 2)
    first = ClipView(28)(rows)
    assert (first - last).abs().max() < 2.5 / 255 / 0.26  # two grey levels, by rounding


def test_an_error_of_the_body_names_the_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    message = r"cannot read mask .*x\.png: MemoryError"
    with pytest.raises(OSError, match=message), open_image(tmp_path / "x.png", "mask"):
        raise MemoryError
    check_file(Path(tmp_path / "x.png"))
