"""Views: golden inputs, sizes, OpenCV's reading of every kind of image, and files that are not whole."""

import io
import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data.resize import resize_bilinear
from data.views import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SAM_MEAN,
    SAM_STD,
    ClipView,
    PaddedView,
    SamView,
    SquareView,
    StretchedView,
    load_view,
)
from tests.records import names, record_folder
from utils.images import as_rgb, read_image


def scene(height=48, width=64):
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("name", names("lisa", "lasagna"))
@pytest.mark.parametrize("index", [0, 1])
def test_golden_inputs(name, index):
    folder = record_folder(name)
    record = np.load(folder / "golden.npz")
    image = read_image(folder / f"image{index}.png")
    pixels = load_view(folder / "clip")(image)
    np.testing.assert_allclose(pixels.numpy(), record[f"clip{index}"], atol=1e-6, rtol=0)
    seg_pixels, geometry = SamView()(image)
    assert np.array_equal(seg_pixels[:, :8, :8].numpy(), record[f"sam_corner{index}"])
    assert seg_pixels.double().sum().item() == pytest.approx(record[f"sam_sum{index}"].item(), abs=1e-6)
    assert geometry.original == image.shape[:2] and geometry.resized == tuple(record["resize"][index])


@settings(max_examples=200, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([128, 448, 1024]))
def test_sam_geometry_fills_one_side_and_keeps_the_shape(height, width, size):
    resized = SamView(size).geometry(height, width).resized
    assert max(resized) == size and min(resized) >= 1
    assert abs(min(resized) - size * min(height, width) / max(height, width)) <= 1


def test_sam_view_pads_right_and_below_with_zeros():
    for shape in ((30, 64), (64, 30)):
        pixels, geometry = SamView(128)(scene(*shape))
        height, width = geometry.resized
        assert pixels.shape == (3, 128, 128) and pixels.dtype == torch.float32
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
        assert pixels[:, :height, :width].abs().amin(0).max() > 0


SIDES = [
    (480, 640),
    (360, 480),
    (425, 640),
    (427, 640),
    (640, 428),
    (500, 375),
    (1, 1),
    (3, 640),
    (1280, 960),
    (961, 1024),
]


@pytest.mark.parametrize(
    ("shape", "size"),
    [(shape, size) for shape in SIDES for size in (1024, 160)]
    + [((2, 8191), 8192), ((3, 8191), 16384), ((2, 5), 1 << 15)],
)
def test_the_padded_view_has_the_bytes_of_pillow(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = PaddedView(size).geometry(*shape).resized
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    assert np.array_equal(resize_bilinear(image, (height, width)).transpose(1, 2, 0), expected)


def test_normalisation_is_per_channel():
    image = np.full((20, 20, 3), (10, 100, 200), np.uint8)
    clip, (sam, _) = ClipView(8)(image), SamView(16)(image)
    for channel, value in enumerate((10, 100, 200)):
        expected = (value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(clip[channel], torch.full((8, 8), expected), atol=1e-5, rtol=1e-5)
        expected = (value - SAM_MEAN[channel]) / SAM_STD[channel]
        torch.testing.assert_close(sam[channel], torch.full((16, 16), expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("resample", ["bilinear", "pil_bicubic"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (7, 300), (1, 1)])
def test_a_square_view_squeezes_the_whole_image(shape, resample):
    image = scene(*shape)
    pixels, geometry = SquareView(32, resample=resample)(image)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert (geometry.original, geometry.resized) == (shape, (32, 32))
    mirrored, _ = SquareView(32, resample=resample)(image[::-1, ::-1])  # strides below zero
    torch.testing.assert_close(mirrored.flip(1, 2), pixels, atol=0.05, rtol=0)  # bytes may round by one


def test_a_square_view_has_the_statistics_of_its_head():
    image = np.full((20, 30, 3), (10, 100, 200), np.uint8)
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3)):
        pixels, _ = SquareView(16, mean, std)(image)
        for channel, value in enumerate((10, 100, 200)):
            expected = (value / 255 - mean[channel]) / std[channel]
            torch.testing.assert_close(pixels[channel], torch.full((16, 16), expected), atol=1e-5, rtol=1e-5)


def test_the_two_ways_of_resampling_are_what_their_names_say():
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    bilinear, bicubic = SquareView(64).resize(image), SquareView(64, resample="pil_bicubic").resize(image)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    expected = torch.nn.functional.interpolate(floats, (64, 64), mode="bilinear", antialias=True)[0]
    assert torch.equal(bilinear, expected)
    pil = np.asarray(Image.fromarray(image).resize((64, 64)))  # PIL's default filter is bicubic
    assert torch.equal(bicubic, torch.from_numpy(pil.copy()).permute(2, 0, 1) / 255)
    assert (bilinear - bicubic).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (7, 300), (5, 5)])
def test_clip_view_crops_the_centre(shape):
    image = scene(*shape)
    pixels = ClipView(32)(image)
    assert pixels.shape == (3, 32, 32)
    flipped = ClipView(32)(np.ascontiguousarray(image[::-1, ::-1]))
    if (int(32 * max(shape) / min(shape)) - 32) % 2 == 0:
        torch.testing.assert_close(pixels, flipped.flip(1, 2), atol=0.04, rtol=0)  # resampling may round by one


@pytest.mark.parametrize("size", [224, {"shortest_edge": 224}])
def test_image_processor_files_old_and_new(tmp_path, size):
    values = {"size": size, "crop_size": 224, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert load_view(tmp_path) == ClipView(224, (0.5,) * 3, (0.25,) * 3)


def test_without_an_image_processor_file_clip_defaults_hold(tmp_path):
    assert load_view(tmp_path, ClipView(336)) == ClipView(336, CLIP_MEAN, CLIP_STD)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224, "crop_size": 256}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: crop_size 256 is larger than size 224"):
        load_view(tmp_path)


PROCESSORS = {  # as released: the class, and its settings where they are not its defaults
    "openai/clip-vit-large-patch14-336": (CLIPImageProcessorPil, {"size": {"shortest_edge": 336}, "crop_size": 336}),
    "google/siglip-so400m-patch14-384": (SiglipImageProcessorPil, {"size": {"height": 384, "width": 384}}),
    "facebook/dinov2-small": (
        BitImageProcessorPil,
        {"size": {"shortest_edge": 256}, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
    ),
}


@pytest.mark.parametrize("shape", [(300, 400), (401, 300), (64, 517), (9, 7)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_views_equal_the_image_processors(tmp_path, name, shape):
    kind, settings = PROCESSORS[name]
    processor = kind(**settings)
    processor.save_pretrained(tmp_path)
    image = scene(*shape)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    view = load_view(tmp_path)
    assert expected.shape == (3, view.size, view.size)
    torch.testing.assert_close(view(image), expected, atol=1e-6, rtol=0)  # before normalisation every byte is equal


@pytest.mark.parametrize("shape", [(300, 400), (401, 300), (64, 517)])
def test_a_bilinear_square_is_resized_in_floating_point(tmp_path, shape):
    """As DINOv3's processor does it, whose class needs torchvision: equal to one of bytes but for their rounding."""
    processor = SiglipImageProcessorPil(resample=2, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    processor.save_pretrained(tmp_path)
    image = scene(*shape)
    view = load_view(tmp_path)
    assert view == StretchedView(224, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(view(image), expected, atol=1.5 / 255 / min(IMAGENET_STD), rtol=0)


def test_a_square_view_shows_the_full_image(tmp_path):
    view = StretchedView(32, (0.5,) * 3, (0.5,) * 3)
    assert view.shows_all and view.geometry(10, 50).resized == (32, 32)
    image = np.zeros((10, 50, 3), np.uint8)
    image[:, 25:] = 255
    pixels = view(image)
    assert bool((pixels[:, :, :12] == -1).all() and (pixels[:, :, 20:] == 1).all())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 16}}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: one square is supported"):
        load_view(tmp_path)


# --- reading


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_reading_equals_opencv_in_rgb(tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    cv2.imwrite(str(path), scene())
    assert np.array_equal(read_image(path), cv2.imread(str(path))[..., ::-1])


def test_exif_orientation_is_applied(tmp_path):
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(scene(48, 64)).save(path, exif=exif, quality=95)
    image = read_image(path)
    assert image.shape == (64, 48, 3)
    plain = tmp_path / "plain.jpg"
    Image.fromarray(scene(48, 64)).save(plain, quality=95)
    assert np.array_equal(image, np.rot90(read_image(plain), -1))


def test_other_pixel_formats_become_rgb_bytes(tmp_path):
    image = Image.fromarray(scene())
    grey, palette = image.convert("L"), image.convert("P", palette=Image.Palette.ADAPTIVE)
    pictures = {"grey.png": grey, "palette.png": palette, "alpha.png": image.convert("RGBA")}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), np.asarray(picture.convert("RGB"))), name
    cv2.imwrite(str(tmp_path / "deep.png"), scene().astype(np.uint16)[..., ::-1] * 257)
    assert np.array_equal(read_image(tmp_path / "deep.png"), scene())
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    cmyk = read_image(tmp_path / "cmyk.jpg")
    assert cmyk.dtype == np.uint8 and np.abs(cmyk.astype(int) - scene()).mean() < 8


def test_deep_grey_one_bit_and_half_transparent_pictures(tmp_path):
    grey = cv2.cvtColor(scene(), cv2.COLOR_RGB2GRAY)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep_grey.png")
    assert np.array_equal(read_image(tmp_path / "deep_grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey > 128).save(tmp_path / "one_bit.png")
    assert np.array_equal(read_image(tmp_path / "one_bit.png")[..., 0], np.where(grey > 128, 255, 0))
    Image.fromarray(np.stack([grey, grey // 2], axis=2), "LA").save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png"), np.repeat(grey[..., None], 3, axis=2))
    palette = Image.fromarray(scene()).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGBA"))[..., :3])


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("alpha", [255, 128, 0])
@pytest.mark.parametrize("ending", ["png", "webp", "tif", "avif", "jp2"])
def test_alpha_changes_no_colour(tmp_path, ending, alpha, turned):
    """Neither of a file nor of the image that a caller has opened."""
    if ending == "jp2" and turned > 1:
        pytest.skip("a JPEG 2000 has no EXIF orientation")
    path, exif = tmp_path / f"a.{ending}", Image.Exif()
    exif[0x0112] = turned
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[:20], colours[20:] = (220, 60, 10), (20, 30, 200)
    image = Image.fromarray(colours)
    image.putalpha(alpha)
    exact = {"webp": {"lossless": True, "exact": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}
    image.save(path, exif=exif, **exact.get(ending, {}))
    expected = colours if turned == 1 else np.rot90(colours, -1)
    # from bytes: Pillow 12 maps the file of an uncompressed TIFF with its sides swapped
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        in_memory = as_rgb(ImageOps.exif_transpose(opened))
    for pixels in (read_image(path), in_memory):
        assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).max() < 4


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1)])
def test_the_smallest_pictures_have_both_views(tmp_path, ending, shape):
    path = tmp_path / f"one.{ending}"
    Image.fromarray(np.full((*shape, 3), (200, 100, 0), np.uint8)).save(path)
    image = read_image(path)
    assert image.shape == (*shape, 3)
    assert ClipView(8)(image).shape == (3, 8, 8)
    pixels, geometry = SamView(32)(image)
    assert geometry.original == shape and max(geometry.resized) == 32 and min(geometry.resized) >= 1
    assert pixels[:, : geometry.resized[0], : geometry.resized[1]].isfinite().all()


@pytest.mark.parametrize("name", ["with blanks (1).jpg", "größe 図 🐈.png", "per%20cent+[a]*?.jpg", "UPPER.JPG"])
def test_names_of_every_kind(tmp_path, name):
    path = tmp_path / "a folder é" / name
    path.parent.mkdir()
    Image.fromarray(scene()).save(path)
    assert read_image(path).shape == (48, 64, 3)


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9, 0.99])
def test_a_truncated_picture_is_named(tmp_path, ending, kept):
    buffer = io.BytesIO()
    Image.fromarray(scene(120, 160)).save(buffer, {"jpg": "jpeg", "png": "png"}[ending])
    path = tmp_path / f"half.{ending}"
    path.write_bytes(buffer.getvalue()[: int(kept * len(buffer.getvalue()))])
    with pytest.raises(OSError, match=rf"half\.{ending}"):
        read_image(path)


def test_other_unreadable_files_are_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("not a picture")
    for name, message in (("notes.jpg", "cannot read image .*notes.jpg"), ("none.jpg", "no image .*none.jpg")):
        with pytest.raises(OSError, match=message):
            read_image(tmp_path / name)


BYTES = {  # view: its mean and deviation, and what a byte is divided by before
    "clip": (ClipView(16), [255 * value for value in CLIP_MEAN], [255 * value for value in CLIP_STD], 1),
    "padded": (PaddedView(16), SAM_MEAN, SAM_STD, 1),
    "sam": (SamView(16), SAM_MEAN, SAM_STD, 1),
    "square": (SquareView(16, resample="pil_bicubic"), IMAGENET_MEAN, IMAGENET_STD, 255),
    "stretched": (StretchedView(16, IMAGENET_MEAN, IMAGENET_STD), IMAGENET_MEAN, IMAGENET_STD, 255),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_normalised_in_fp32_one_operation_after_another(name):
    """All 256 values of all channels, to the bit; numpy has its own arithmetic."""
    view, mean, std, scale = BYTES[name]
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    shown = view.show(image)
    assert shown.dtype == torch.uint8 and torch.equal(shown, torch.from_numpy(image).permute(2, 0, 1))
    numbers = view.normalise(shown[None], [(16, 16)])[0]
    for channel in range(3):
        expected = image[..., channel].astype(np.float32) / np.float32(scale)
        expected = (expected - np.float32(mean[channel])) / np.float32(std[channel])
        assert np.array_equal(numbers[channel].numpy(), expected)
    assert torch.equal(view.normalise(numbers[None], [(16, 16)])[0], numbers)  # floats pass


def test_padding_of_bytes_is_zero_after_normalisation():
    shapes = [(8, 16), (16, 4)]
    view = SamView(16)
    images = [np.full((*shape, 3), 200, np.uint8) for shape in shapes]
    numbers = view.normalise(torch.stack([view.show(image) for image in images]), shapes)
    for image, one in zip(images, numbers, strict=True):
        assert torch.equal(one, view(image)[0])
    assert not numbers[0, :, 8:].any() and not numbers[1, :, :, 4:].any() and numbers[0, :, :8].all()


def test_a_view_that_resizes_in_floating_point_gives_no_bytes():
    view = SquareView(16)
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert view.show(image).dtype == torch.float32 and torch.equal(view.show(image), view(image)[0])
