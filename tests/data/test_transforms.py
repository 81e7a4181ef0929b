import numpy as np
import pytest
import torch

from data.transforms import flip_boxes, padded_size, resize_boxes, resize_image, resized_size


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((480, 640), (1333, 800), (800, 1067)),  # factor 800 / 480: 1066.67 is rounded up
        ((640, 480), (1333, 800), (1067, 800)),  # the same, turned by 90 degrees
        ((480, 640), (800, 1333), (800, 1067)),  # the order of the scale does not matter
        ((427, 640), (1333, 800), (800, 1199)),  # factor 1.87354: 1199.06
        ((300, 1000), (1333, 800), (400, 1333)),  # the long edge is the limit: 399.9
        ((1600, 2666), (1333, 800), (800, 1333)),  # shrinks as well
        ((480, 640), (320, 240), (240, 320)),
        ((20, 20000), (1333, 800), (1, 1333)),
        ((1, 20000), (1333, 800), (1, 1333)),  # 0.07 pixel high: one is kept
        ((1, 1), (1333, 800), (800, 800)),
    ],
)
def test_resized_size(size, scale, expected):
    assert resized_size(size, scale) == expected


def test_padded_size():
    assert padded_size((800, 1333)) == (800, 1344)
    assert padded_size((1, 33)) == (32, 64)


def test_resize_boxes_uses_each_edges_own_ratio_and_clips():
    boxes = torch.tensor([[30.0, 60.0, 330.0, 240.0], [-10.0, -10.0, 700.0, 500.0]])
    resized = resize_boxes(boxes, (480, 640), (800, 1067))
    expected = [[50.015625, 100.0, 550.171875, 400.0], [0, 0, 1067, 800]]
    np.testing.assert_allclose(resized, expected, rtol=1e-6)
    assert resize_boxes(torch.zeros(0, 4), (480, 640), (800, 1067)).shape == (0, 4)


def test_flip_boxes():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert flip_boxes(boxes, 100).tolist() == [[70, 20, 90, 40]]
    assert torch.equal(flip_boxes(flip_boxes(boxes, 100), 100), boxes)
    assert flip_boxes(torch.zeros(0, 4), 100).shape == (0, 4)


def test_resize_image_is_bilinear_without_antialiasing_by_default():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, ::2] = 200
    # At half size, each sample is between two columns; at a quarter, it uses the two middle columns of four.
    assert resize_image(image, (4, 4)).unique().tolist() == [100]
    image[:, :, :] = torch.tensor([0, 200, 200, 0, 0, 200, 200, 0], dtype=torch.uint8)
    assert resize_image(image, (2, 2)).unique().tolist() == [200]
    smooth = resize_image(image, (2, 2), antialias=True)
    assert smooth.dtype == torch.uint8 and 90 < smooth.float().mean() < 160
