"""Every readable kind of image gives the right pixels, and every unreadable kind gives one clear line."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from odd_images import UPRIGHT, pixels, write_png16, write_rotated
from PIL import Image

import data.inputs.images
from data import CocoDataset, DataError, UnreadableImage
from data.inputs.images import read_image, write_picture


def read(path):
    """The image as (h, w, 3) int, for subtraction."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    path, stored = tmp_path / f"turned{suffix}", pixels()
    write_rotated(path, stored, orientation)
    expected = UPRIGHT[orientation](stored)
    image = read(path)
    assert image.shape == expected.shape and abs(image - expected).max() <= (0 if suffix == ".png" else 6)
    assert read_image(path, upright=False).shape == (3, 20, 30)
    if orientation in (2, 3, 4):  # turning keeps the size: only the pixels show whether it was done
        assert abs(image - stored).max() > 20


@pytest.mark.parametrize(
    ("name", "make", "expected", "tolerance"),
    [
        ("alpha.png", lambda i: i.putalpha(7) or i, lambda a: a, 0),  # nearly transparent: alpha is dropped
        ("grey.png", lambda i: i.convert("L"), None, 0),
        ("grey.jpg", lambda i: i.convert("L"), None, 6),
        ("grey alpha.png", lambda i: i.convert("LA"), None, 0),
        ("two colours.png", lambda i: i.convert("1"), None, 0),
        ("palette.png", lambda i: i.quantize(16), None, 0),
        ("cmyk.jpg", lambda i: i.convert("CMYK"), lambda a: a, 8),
        ("progressive.jpg", lambda i: i, lambda a: a, 8),
        ("lossless.webp", lambda i: i, lambda a: a, 0),
        ("one.gif", lambda i: i.quantize(16), None, 0),
        ("colour.bmp", lambda i: i, lambda a: a, 0),
        ("grey.bmp", lambda i: i.convert("L"), None, 0),
        ("palette.bmp", lambda i: i.quantize(16), None, 0),
        ("colour.tif", lambda i: i, lambda a: a, 0),
        ("alpha.tiff", lambda i: i.putalpha(7) or i, lambda a: a, 0),
        ("grey.tif", lambda i: i.convert("L"), None, 0),
        ("bmp inside.jpg", lambda i: i, lambda a: a, 0),
    ],
)
def test_pixels(tmp_path, name, make, expected, tolerance):
    image = make(Image.fromarray(pixels()))
    options = {"quality": 100} if name.endswith(".jpg") else {"lossless": True} if name.endswith(".webp") else {}
    if "bmp inside" in name:
        options = {"format": "BMP"}
    image.save(tmp_path / name, **options, **({"progressive": True} if "progressive" in name else {}))
    target = expected(pixels()) if expected else np.asarray(image.convert("RGB"))
    assert abs(read(tmp_path / name) - target).max() <= tolerance


@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_upper_eight_are_kept(tmp_path, channels):
    values = pixels()[..., :channels].astype(np.uint16) * 256 + 255
    write_png16(tmp_path / "deep.png", values.squeeze(-1) if channels == 1 else values)
    assert (read(tmp_path / "deep.png") == np.broadcast_to(pixels()[..., :channels], (20, 30, 3))).all()


def test_a_tiff_of_16_bits_and_one_of_32(tmp_path):
    values = pixels()[..., 0].astype(np.uint16) * 256 + 255
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert (read(tmp_path / "deep.tif") == np.broadcast_to(pixels()[..., :1], (20, 30, 3))).all()
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "deeper.tif")
    with pytest.raises(UnreadableImage, match=r"deeper\.tif cannot be read \(its values have 32 bits\)"):
        read_image(tmp_path / "deeper.tif")


@pytest.mark.parametrize("name", ["cut.bmp", "cut.tif"])
def test_a_bmp_or_tiff_cut_anywhere_is_an_error(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(pixels(60, 80)).save(path)
    content = path.read_bytes()
    for cut in range(0, len(content) - 400, 411):
        path.write_bytes(content[:cut])
        with pytest.raises(UnreadableImage, match=r"image .*cut\..* cannot be read \(.*\): replace the fil") as caught:
            read_image(path)
        assert "\n" not in str(caught.value)


@pytest.fixture(params=["Pillow", "simplejpeg"])
def decoder(request, monkeypatch):
    """The two decoders of JPEG, of which the second is optional."""
    if request.param == "Pillow":
        monkeypatch.setattr(data.inputs.images, "simplejpeg", None)
    elif data.inputs.images.simplejpeg is None:
        pytest.skip("needs the extra jpeg")
    return request.param


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_cut_anywhere_is_an_error(tmp_path, options, decoder):
    Image.fromarray(pixels(60, 80)).save(tmp_path / "whole.jpg", quality=95, **options)
    content, path = (tmp_path / "whole.jpg").read_bytes(), tmp_path / "cut.jpg"
    read_image(tmp_path / "whole.jpg")
    for cut in [*range(0, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(UnreadableImage, match=r"image .*cut\.jpg cannot be read \(.*\): replace the file$"):
            read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True, "quality": 30}], ids=str)
def test_decoders_of_jpeg_give_the_pixels_of_torchvision(tmp_path, mode, options, decoder):
    """torchvision's decoder is libjpeg-turbo, with which all results so far were computed."""
    io = pytest.importorskip("torchvision.io")
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (41, 67, 3)).astype(np.uint8)
    Image.fromarray(noise // 2 + pixels(41, 67) // 2).convert(mode).save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = io.decode_image(str(path), mode=io.ImageReadMode.RGB)
    difference = (read_image(path).int() - expected.int()).abs().max()
    assert difference <= (1 if mode == "CMYK" else 0)


def test_what_is_written_is_read(tmp_path, decoder):
    image = torch.from_numpy(pixels(50, 70)).permute(2, 0, 1)
    write_picture(tmp_path / "a.png", image)
    assert torch.equal(read_image(tmp_path / "a.png"), image)
    for quality, worst in ((99, 5), (30, 20)):
        write_picture(tmp_path / "a.jpg", image, quality)
        found = read_image(tmp_path / "a.jpg")
        assert (found.int() - image.int()).abs().max() <= worst and found.stride() == (1, 210, 3)
        found.add_(1)  # its memory is its own


def test_kinds_that_are_refused(tmp_path):
    """An animation, and formats that Pillow would read by running another program."""
    still, moved = Image.fromarray(pixels()), Image.fromarray(pixels(seed=1))
    still.save(tmp_path / "moving.webp", save_all=True, append_images=[moved])
    with pytest.raises(UnreadableImage, match=r"moving.webp cannot be read \(it is animated\): replace the file$"):
        read_image(tmp_path / "moving.webp")
    still.save(tmp_path / "page.eps")
    with pytest.raises(UnreadableImage, match="it is damaged, or not a JPEG, PNG, WebP, BMP, TIFF or GIF"):
        read_image(tmp_path / "page.eps")


@pytest.mark.filterwarnings("error")
def test_several_jpegs_in_a_file_and_broken_exif_data(tmp_path):
    """Cameras write previews behind a photograph; what EXIF data say wrongly does not matter."""
    Image.fromarray(pixels()).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.fromarray(pixels(9, 9))])
    (tmp_path / "a.mpo").rename(tmp_path / "several.jpg")
    assert read_image(tmp_path / "several.jpg").shape == (3, 20, 30)
    Image.fromarray(pixels()).save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read_image(tmp_path / "broken.jpg").shape == (3, 20, 30)
    write_rotated(tmp_path / "nine.png", pixels(), 9)
    assert (read(tmp_path / "nine.png") == pixels()).all()


def test_a_png_cut_within_its_pixels_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    content, path = (tmp_path / "whole.png").read_bytes(), tmp_path / "cut.png"
    for cut in range(0, len(content) - 20, 211):  # what follows the pixels is 16 bytes long, and not needed
        path.write_bytes(content[:cut])
        with pytest.raises(UnreadableImage, match=r"image .*cut\.png cannot be read \(.*\): replace the file$"):
            read_image(path)


def test_paths_that_no_image_can_be_read_from(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, reason in [("folder.png", "Is a directory"), ("x" * 300 + ".png", "name too long"),
                         ("none.png", "does not exist"), ("none/none.png", "does not exist")]:
        with pytest.raises(UnreadableImage, match=reason) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (20, 20000), (20000, 20), (1, 3000)], ids=str)
@pytest.mark.parametrize("scale", [(1333, 800), (64, 64)], ids=str)
def test_extreme_sizes(write_coco, size, scale):
    h, w = size
    dataset = CocoDataset(*write_coco([size], [(10, 1, [0, 0, w, h], {})]), training=True, scale=scale)
    image, target = dataset[0]
    new_h, new_w = target["image_size"]
    assert image.shape == (3, new_h, new_w) and min(new_h, new_w) >= 1
    assert max(new_h, new_w) <= max(scale) and min(new_h, new_w) <= min(scale)
    assert target["boxes"].tolist() == [[0, 0, new_w, new_h]]


# --- skipping ---

@pytest.fixture
def broken(write_coco):
    """Six images, of which 1 is empty and 2 missing."""
    source = write_coco([(40, 60)] * 6, [(10 + i, 1, [1, 1, 9 + i, 9], {}) for i in range(6)])
    (source[0] / "1.png").write_bytes(b"")
    (source[0] / "2.png").unlink()
    return source


def test_the_next_image_stands_in_for_unreadable_ones(broken):
    dataset = CocoDataset(*broken, training=True, skip_unreadable=True, scale=(60, 40), flip=0.5)
    for index, image_id, count in [(0, 10, 0), (1, 13, 2), (2, 13, 1), (3, 13, 0)]:
        image, target = dataset[4, index]
        assert target["image_id"] == image_id and len(target.get("skipped", ())) == count
        if count:  # everything belongs to the replacement image, also the augmentation
            stands_in, own = dataset[4, 3]
            assert torch.equal(image, stands_in) and torch.equal(target["boxes"], own["boxes"])
    assert "1.png cannot be read (it is empty)" in dataset[1][1]["skipped"][0]
    assert "2.png does not exist" in dataset[1][1]["skipped"][1]


def test_the_last_image_is_followed_by_the_first(broken):
    (broken[0] / "5.png").write_bytes(b"")
    assert CocoDataset(*broken, training=True, skip_unreadable=True)[5][1]["image_id"] == 10


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"training": True}, True), ({"training": False}, False), ({"training": False, "skip_unreadable": True}, False)],
)
def test_nothing_is_skipped_by_default_nor_ever_in_evaluation(broken, options, hint):
    with pytest.raises(UnreadableImage, match=r"1\.png cannot be read") as caught:
        CocoDataset(*broken, **options)[1]
    assert ("data.skip_unreadable=true" in str(caught.value)) == hint


def test_a_folder_without_any_of_the_images_stops_training_all_the_same(broken):
    for path in broken[0].iterdir():
        path.unlink()
    with pytest.raises(DataError, match="6 images in a row cannot be read; the last one: .* does not exist"):
        CocoDataset(*broken, training=True, skip_unreadable=True)[0]


def test_another_size_than_annotated_is_not_skipped(broken):
    content = json.loads(broken[1].read_text())
    content["images"][1]["width"] = content["images"][0]["width"] = 61
    broken[1].write_text(json.dumps(content))
    with pytest.raises(DataError, match="is 60 x 40 pixels .* but 61 x 40 in"):
        CocoDataset(*broken, training=True, skip_unreadable=True)[0]


def test_the_header_alone_refuses_too_many_pixels(tmp_path, monkeypatch):
    """A small file: it is not decoded, which would take more than a gigabyte."""
    path = tmp_path / "large.png"
    Image.new("1", (20000, 20000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(UnreadableImage, match=r"it has 20000 x 20000 pixels, more than 268435456\): .*MAX_PIXELS"):
        read_image(path)
    Image.new("RGB", (40, 30)).save(path)
    monkeypatch.setenv("DENSEKD_MAX_PIXELS", "1199")
    with pytest.raises(UnreadableImage, match="40 x 30"):
        read_image(path)
    monkeypatch.setenv("DENSEKD_MAX_PIXELS", "1200")
    assert read_image(path).shape == (3, 30, 40)
    assert Image.MAX_IMAGE_PIXELS  # Pillow's own limit is as it was


def test_a_pipe_is_not_read(tmp_path):
    """It would wait for somebody who writes."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="it is not a regular file"):
        read_image(tmp_path / "pipe.jpg")
