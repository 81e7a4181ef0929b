"""Every augmentation on images with a rectangle of its own colour for each box: boxes stay on their rectangles."""
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from data import CocoDataset
from data.augment import AUGMENTATIONS, build_augmentations
from data.augment.sample import FILL, IGNORED, Sample, apply, moved, random_draws
from data.images import write_picture

SIZE = (120, 160)
BOXES = {0: [10, 12, 50, 40], 1: [70, 60, 150, 110], 2: [90, 5, 120, 35], IGNORED: [8, 60, 48, 112]}  # by label
COLOURS = {0: (255, 0, 0), 1: (0, 255, 0), 2: (0, 0, 255), IGNORED: (255, 255, 255)}
MOVING = [{"type": "RandomCrop", "scale": (0.3, 0.9)}, {"type": "RandomZoomOut", "side_range": (1.0, 2.0)},
          {"type": "RandomAffine", "scale": (0.6, 1.5), "translate": (0.3, 0.3)},
          {"type": "RandomAffine", "degrees": 20.0, "shear": 8.0}, {"type": "RandomVerticalFlip"},
          {"type": "RandomQuarterTurn"}]
DRAWS = 40


def make_sample(boxes=BOXES, size=SIZE) -> Sample:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for label, (x1, y1, x2, y2) in boxes.items():
        image[:, y1:y2, x1:x2] = torch.tensor(COLOURS[label], dtype=torch.uint8)[:, None, None]
    corners = torch.tensor(list(boxes.values()), dtype=torch.float32).reshape(-1, 4)
    return Sample(image, corners, torch.tensor(list(boxes), dtype=torch.int64), torch.ones(len(boxes)))


def augmented(entry, draw, sample=None, other=None) -> Sample:
    with random_draws(0, draw):
        return apply(build_augmentations([entry | {"p": 1.0}]), sample or make_sample(), lambda size: other)


def pixels_of(image, label) -> torch.Tensor:
    """Where an image has a label's colour; at an edge, where more than half of a pixel has it."""
    colour = torch.tensor(COLOURS[label])[:, None, None]
    return ((image.float() - colour).abs() < 128).all(dim=0) & ((image > 140) == (colour > 0)).all(dim=0)


def extent(mask) -> list[int]:
    """The box (x1, y1, x2, y2) around the true pixels."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


def assert_inside(sample):
    h, w = sample.size
    assert (sample.boxes >= 0).all() and (sample.boxes <= torch.tensor([w, h, w, h])).all()
    assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
    assert len(sample.boxes) == len(sample.labels) == len(sample.visible)


@pytest.mark.parametrize("entry", MOVING, ids=lambda entry: entry["type"])
def test_boxes_stay_around_their_pixels(entry):
    """A box that is left is the extent of its colour, within a pixel; one that is dropped leaves few pixels."""
    kept, dropped = 0, 0
    for draw in range(DRAWS):
        sample = augmented(entry, draw)
        assert_inside(sample)
        for label, (x1, y1, x2, y2) in BOXES.items():
            seen, found = pixels_of(sample.image, label), sample.boxes[sample.labels == label]
            if len(found):
                kept += 1
                # A turned rectangle's box is larger than what is seen if a corner was cut off.
                h, w = sample.size
                cut = "degrees" in entry and (found[0] <= 0).any() | (found[0] >= torch.tensor([w, h, w, h])).any()
                assert torch.tensor(extent(seen)).float().sub(found[0]).abs().max() <= (10 if cut else 1.5)
            else:
                dropped += 1
                # a crop drops a box whose centre is outside, so up to half of it is still seen
                zoom = 1.5 ** 2 if entry["type"] == "RandomAffine" else 1
                assert seen.sum() <= (0.5 if entry["type"] == "RandomCrop" else 0.22) * zoom * (x2 - x1) * (y2 - y1)
    assert kept > DRAWS
    cuts = entry["type"] in ("RandomCrop", "RandomAffine") and "degrees" not in entry
    assert dropped > 0 if cuts else dropped < DRAWS


@pytest.mark.parametrize("entry", [{"type": "RandomVerticalFlip"}, {"type": "RandomQuarterTurn"}])
def test_flips_and_quarter_turns_are_exact(entry):
    shapes = set()
    for draw in range(DRAWS):
        sample = augmented(entry, draw)
        shapes.add((sample.size, tuple(sample.boxes[0].int().tolist())))
        for label, box in zip(sample.labels.tolist(), sample.boxes):
            torch.testing.assert_close(box, torch.tensor(extent(pixels_of(sample.image, label))).float(), rtol=0,
                                       atol=1e-4)
        assert sample.image.sum() == make_sample().image.sum()
    expected = {"RandomVerticalFlip": {((120, 160), (10, 80, 50, 108))}, "RandomQuarterTurn": {
        ((160, 120), (12, 110, 40, 150)), ((120, 160), (110, 80, 150, 108)), ((160, 120), (80, 10, 108, 50))}}
    assert shapes == expected[entry["type"]]


def test_a_crop_keeps_the_boxes_whose_centre_is_inside():
    for draw in range(DRAWS):
        sample = augmented({"type": "RandomCrop", "scale": (0.2, 0.5)}, draw)
        assert (sample.labels != IGNORED).any()
        for label, (x1, y1, x2, y2) in BOXES.items():
            left = pixels_of(sample.image, label).sum() / ((x2 - x1) * (y2 - y1))
            if label != IGNORED and (sample.labels == label).any():
                assert left >= 0.24  # the centre is inside
            elif label != IGNORED:
                assert left <= 0.5
            else:  # an ignored box is dropped only when it is empty
                assert (left > 0) == (sample.labels == label).any()


def test_a_crop_without_a_box_is_not_taken():
    tiny = make_sample({0: [150, 110, 154, 114]})
    crops = [augmented({"type": "RandomCrop", "scale": (0.05, 0.1)}, draw, tiny) for draw in range(DRAWS)]
    assert all(sample.labels.tolist() == [0] for sample in crops)
    assert any(sample.size == SIZE for sample in crops) and any(sample.size != SIZE for sample in crops)
    empty = make_sample({})
    assert augmented({"type": "RandomCrop", "scale": (0.1, 0.3)}, 0, empty).size != SIZE


def test_a_box_cut_twice_counts_both_cuts():
    """A third is left after each of two cuts, so a ninth of the box after both: it is dropped."""
    sample = make_sample({1: [0, 0, 90, 90], IGNORED: [0, 90, 90, 110]})
    once = moved(sample, F.crop, top=0, left=60, height=120, width=100)
    assert once.labels.tolist() == [1, IGNORED] and once.visible[0].item() == pytest.approx(1 / 3)
    twice = moved(once, F.crop, top=60, left=0, height=60, width=100)
    assert twice.labels.tolist() == [IGNORED] and twice.boxes.tolist() == [[0, 30, 30, 50]]


@pytest.mark.parametrize("entry", [{"type": "RandomZoomOut", "side_range": (3.0, 3.0)},
                                   {"type": "RandomAffine", "scale": (0.3, 0.3), "translate": (0.0, 0.0)},
                                   {"type": "RandomAffine", "scale": (2.0, 2.0), "translate": (0.2, 0.2)}])
def test_a_smaller_object_is_no_hidden_one(entry):
    """`visible` is the share of the object that is in the image, whatever its size."""
    counted = 0
    for draw in range(10):
        sample = augmented(entry, draw)
        zoom = 1 / 3 if entry["type"] == "RandomZoomOut" else entry["scale"][0]
        for label, visible in zip(sample.labels.tolist(), sample.visible.tolist()):
            x1, y1, x2, y2 = BOXES[label]
            seen = pixels_of(sample.image, label).sum().item() / ((x2 - x1) * (y2 - y1) * zoom ** 2)
            assert visible == pytest.approx(seen, abs=0.12)
            counted += 1
        assert zoom > 1 or (len(sample.boxes) == 4 and sample.visible.min() > 0.9)
    assert counted > 10


def test_the_four_images_of_a_mosaic_meet_in_its_point():
    """Dark images that are much smaller than a quarter: there is no gap between them, and they are near the middle."""
    entry = {"type": "Mosaic", "scale": (0.1, 0.2), "center": (0.4, 0.6)}
    for draw in range(10):
        image = augmented(entry, draw, make_sample({}), make_sample({}, (20, 30))).image
        dark = image.sum(dim=0) == 0
        x1, y1, x2, y2 = extent(dark)
        assert dark[:, x1:x2].any(dim=0).all() and dark[y1:y2].any(dim=1).all()
        assert 20 <= y2 - y1 < 60 and 30 <= x2 - x1 < 80 and 0.2 * 120 < y1 < y2 < 0.8 * 120


def test_an_annotated_box_may_reach_beyond_the_image():
    sample = make_sample({0: [0, 0, 20, 40]})._replace(boxes=torch.tensor([[-180.0, 0, 20, 40]]))
    flipped = augmented({"type": "RandomVerticalFlip"}, 0, sample)
    assert flipped.boxes.tolist() == [[0, 80, 20, 120]] and flipped.visible.tolist() == [1]


def test_erasing_drops_the_boxes_that_it_covers():
    outcomes = set()
    for draw in range(4 * DRAWS):
        sample = augmented({"type": "RandomErasing", "scale": (0.1, 0.3)}, draw)
        left = {label: (pixels_of(sample.image, label).sum() / pixels_of(make_sample().image, label).sum()).item()
                for label in BOXES}
        for label, box in BOXES.items():
            there = (sample.labels == label).any().item()
            if abs(left[label] - 0.2) > 1e-3:
                assert there == (left[label] > 0.2 or label == IGNORED)
            assert not there or sample.boxes[sample.labels == label].tolist() == [box]
            outcomes.add(there)
        erased = (sample.image == torch.tensor(FILL)[:, None, None]).all(dim=0).float().mean()
        assert 0.08 < erased < 0.32
    assert outcomes == {True, False}


@pytest.mark.parametrize("entry", [{"type": "ColorJitter", "hue": 0.1}, {"type": "RandomGrayscale"},
                                   {"type": "GaussianBlur", "sigma": (1.0, 2.0)}])
def test_pixels_change_and_boxes_stay(entry):
    first, second = augmented(entry, 0), augmented(entry, 1)
    assert first.image.dtype == torch.uint8 and first.image.shape == (3, *SIZE)
    assert first.boxes.tolist() == list(BOXES.values()) and first.labels.tolist() == list(BOXES)
    assert not torch.equal(first.image, make_sample().image)
    if entry["type"] == "RandomGrayscale":
        assert torch.equal(first.image[0], first.image[2])
    else:
        assert not torch.equal(first.image, second.image)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2)])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_tiny_images_and_images_without_boxes(kind, size):
    for boxes in ({}, {0: [0, 0, 1, 1]}):
        sample = make_sample(boxes, size)
        for draw in range(5):
            result = augmented({"type": kind}, draw, sample, sample)
            assert_inside(result)
            assert result.image.dtype == torch.uint8
            assert sorted(result.size) == sorted(size) or kind == "RandomCrop"


def test_mixup_shows_both_images_with_the_boxes_of_both():
    own = make_sample({0: [10, 12, 50, 40], IGNORED: [60, 10, 80, 30]})
    other = make_sample({1: [20, 30, 60, 50]}, (60, 80))
    corners = set()
    for draw in range(10):
        mixed = augmented({"type": "MixUp", "alpha": 50.0}, draw, own, other)
        assert mixed.labels.tolist() == [0, IGNORED, 1] and mixed.size == SIZE
        assert extent(mixed.image[0] > 60)[:2] == [10, 10]
        green = (mixed.image[1] > 60) & (mixed.image[0] < 60)
        assert extent(green) == mixed.boxes[2].tolist()
        corners.add(tuple(mixed.boxes[2].tolist()))
    assert len(corners) > 5


@pytest.fixture
def scenes(write_coco):
    """Four images, landscape and portrait, with one to three coloured boxes and a crowd."""
    numbers = [{0: BOXES[0]}, {1: [20, 60, 100, 110], 0: BOXES[0]}, {2: BOXES[2], IGNORED: BOXES[IGNORED]}, BOXES]
    sizes = [SIZE, (160, 120), SIZE, SIZE]
    rows = [(10 + i, 1 if label == IGNORED else label + 1, [x1, y1, x2 - x1, y2 - y1],
             {"iscrowd": int(label == IGNORED)})
            for i, boxes in enumerate(numbers) for label, (x1, y1, x2, y2) in boxes.items()]
    folder, file = write_coco(sizes, rows, ((1, "red"), (2, "green"), (3, "blue")))
    for i, (boxes, size) in enumerate(zip(numbers, sizes)):
        write_picture(folder / f"{i}.png", make_sample(boxes, size).image)
    return folder, file


def colour_inside(image, box, label) -> float:
    """The share of a box that has its label's colour, without a border of two pixels."""
    x1, y1, x2, y2 = (round(edge) for edge in box.tolist())
    inner = pixels_of(image, label)[y1 + 2:y2 - 2, x1 + 2:x2 - 2]
    return inner.float().mean().item() if inner.numel() else 1.0


@pytest.mark.parametrize("choice", ["light", [{"type": "Mosaic", "p": 1.0}], [{"type": "RandomCrop", "p": 1.0}, {
    "type": "Mosaic", "p": 1.0}, {"type": "RandomAffine", "p": 1.0}, {"type": "RandomQuarterTurn", "p": 1.0}]])
def test_boxes_of_a_data_set_stay_on_their_colours(scenes, choice):
    entries = build_augmentations(choice)
    dataset = CocoDataset(*scenes, training=True, multi_scale=[(200, 150), (240, 160)], augment=entries)
    images, most, ignored = set(), 0, 0
    for epoch in range(12):
        for index in range(len(dataset)):
            image, target = dataset[epoch, index]
            h, w = target["image_size"]
            assert image.shape == (3, h, w) and max(h, w) <= 240 and min(h, w) <= 160
            assert target["pad_size"] == (-(-h // 32) * 32, -(-w // 32) * 32)
            assert target["image_id"] == 10 + index and target["original_size"] == dataset.sizes[index]
            assert set(target) - {"emptied"} == {"boxes", "labels", "image_size", "pad_size", "original_size",
                                                 "image_id", "ignored_boxes"}
            assert target["labels"].dtype == torch.int64 and target["boxes"].dtype == torch.float32
            for label, box in zip(target["labels"].tolist(), target["boxes"]):
                assert colour_inside(image, box, label) > 0.97
            if choice != "light":  # the light preset also changes brightness
                assert all(colour_inside(image, box, IGNORED) > 0.97 for box in target["ignored_boxes"])
            images.add(image.numpy().tobytes())
            most, ignored = max(most, len(target["boxes"])), ignored + len(target["ignored_boxes"])
    assert len(images) > 40 and ignored > 5
    assert most > 3 if choice != "light" else most <= 3
