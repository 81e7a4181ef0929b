"""The presets of `data.train_augment`: lists of augmentations, as a configuration would write them.

They change no hue and blur nothing, because either takes longer than the rest of `strong` together.
docs/augmentation.md shows these lists.
"""

PRESETS: dict[str, list[dict]] = {
    "none": [],
    "light": [
        {"type": "RandomCrop", "p": 0.5, "scale": (0.5, 1.0)},
        {"type": "RandomZoomOut", "p": 0.3, "side_range": (1.0, 1.5)},
        {"type": "ColorJitter", "p": 0.5, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    ],
    "strong": [
        {"type": "RandomCrop", "p": 0.5, "scale": (0.3, 1.0)},
        {"type": "Mosaic", "p": 0.5},
        {"type": "RandomAffine", "p": 0.5, "translate": (0.1, 0.1), "scale": (0.6, 1.2)},
        {"type": "MixUp", "p": 0.1},
        {"type": "ColorJitter", "p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        {"type": "RandomGrayscale", "p": 0.05},
        {"type": "RandomErasing", "p": 0.2, "scale": (0.01, 0.05)},
    ],
}
