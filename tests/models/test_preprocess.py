"""Pixel statistics, and conversion of a batch between the statistics of two detectors."""
import pytest
import torch

from models import Preprocess

CAFFE = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "channel_order": "bgr"}
UNIT = {"mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]}
OTHER_BGR = {"channel_order": "bgr"}


def batch():
    """uint8 images whose padding is not zero, and their sizes."""
    images = torch.randint(0, 256, (2, 3, 32, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return images, [{"image_size": (30, 50)}, {"image_size": (32, 40)}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("args", [{}, CAFFE, UNIT], ids=["default", "caffe", "unit"])
def test_normalises_and_zeroes_the_padding(args, dtype):
    images, targets = batch()
    model = Preprocess(**args)
    found = model(images, targets, dtype)
    assert found.dtype == dtype and images.dtype == torch.uint8
    order = images.flip(1) if args.get("channel_order") == "bgr" else images
    mean = torch.tensor(args.get("mean", [123.675, 116.28, 103.53]), dtype=torch.float64)
    std = torch.tensor(args.get("std", [58.395, 57.12, 57.375]), dtype=torch.float64)
    expected = (order.double() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for mine, theirs, target in zip(found, expected, targets):
        h, w = target["image_size"]
        torch.testing.assert_close(mine[:, :h, :w], theirs[:, :h, :w].to(dtype), rtol=1e-5, atol=1e-5)
        assert not mine[:, h:].any() and not mine[:, :, w:].any()


@pytest.mark.parametrize("args", [{}, CAFFE], ids=["default", "caffe"])
def test_the_detector_gets_contiguous_images_from_any_memory_format(args):
    images, targets = batch()
    expected = Preprocess(**args)(images, targets)
    found = Preprocess(**args)(images.to(memory_format=torch.channels_last), targets)
    assert found.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-4)], ids=["64", "32"])
@pytest.mark.parametrize("source", [{}, CAFFE, UNIT, OTHER_BGR], ids=["default", "caffe", "unit", "bgr"])
@pytest.mark.parametrize("own", [{}, CAFFE, UNIT, OTHER_BGR], ids=["default", "caffe", "unit", "bgr"])
def test_convert_gives_what_forward_would_have_given(own, source, dtype, tolerance):
    images, targets = batch()
    own, source = Preprocess(**own), Preprocess(**source)
    normalised = source(images, targets, dtype)
    before = normalised.clone()
    found = own.convert(normalised, targets, source)
    assert torch.equal(normalised, before)  # the student's batch is not changed
    torch.testing.assert_close(found, own(images, targets, dtype), rtol=0, atol=tolerance)
    for image, target in zip(found, targets):
        h, w = target["image_size"]
        assert not image[:, h:].any() and not image[:, :, w:].any()


def test_the_same_statistics_pass_the_batch_on():
    images, targets = batch()
    images = Preprocess()(images, targets)
    assert Preprocess().convert(images, targets, Preprocess()) is images


def test_statistics_keep_their_precision_and_are_not_saved():
    model = Preprocess(mean=[123.675, 0.1, 0.3]).half().float()
    assert model.mean.dtype == torch.float64 and not model.state_dict()
    assert model.mean.flatten().tolist() == [123.675, 0.1, 0.3]
