"""Functions that write small COCO-format data sets."""

import json

import pytest
import torch

from data.inputs.images import write_picture


def make_image(path, size, seed=0):
    """Write a PNG with random pixels and `size` (h, w)."""
    pixels = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    write_picture(path, pixels)


@pytest.fixture
def write_coco(tmp_path):
    """Return a function that writes a data set and returns its (image folder, annotation file).

    `sizes` are (h, w), image ids count from 10, `annotations` are (image id, category id, bbox, extra keys).
    """

    def write(sizes, annotations=(), categories=((1, "cat"), (2, "dog")), name="set"):
        folder = tmp_path / name
        folder.mkdir()
        images = []
        for i, size in enumerate(sizes):
            make_image(folder / f"{i}.png", size, seed=i)
            images.append({"id": 10 + i, "file_name": f"{i}.png", "height": size[0], "width": size[1]})
        content = {
            "images": images,
            "categories": [{"id": number, "name": label} for number, label in categories],
            "annotations": [
                {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": 50, "iscrowd": 0, **extra}
                for i, (image, category, box, extra) in enumerate(annotations)
            ],
        }
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        return folder, file

    return write
