"""Networks for `distill.teacher.factory` in tests."""
from torch import nn


class Pyramid(nn.Module):
    """Maps of strides 4 to 64, as a dict that is not in this order."""

    preprocess = {"mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0], "channel_order": "bgr"}

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 4, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(4))

    def forward(self, images):
        maps = [self.norm(self.stem(images))]
        for conv in self.down:
            maps.append(conv(maps[-1].relu()))
        return {str(i): maps[i] for i in (2, 0, 1, 4, 3)}


class Wrapped(nn.Module):
    """Each weight has `model.` in front of its name, which the reader takes for a wrapper."""

    def __init__(self, channels=8):
        super().__init__()
        self.model = Pyramid(channels)
        self.preprocess = self.model.preprocess

    def forward(self, images):
        return list(self.model(images).values())


def build(channels=8):
    return Pyramid(channels)


def without_statistics():
    network = Pyramid(8)
    network.preprocess = None
    return network


def broken():
    raise RuntimeError("no weights\nhere")


def flat():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())


def one_map():
    return nn.Conv2d(3, 8, 3, 8, 1)


def odd():
    network = Pyramid(8)
    network.stem = nn.Conv2d(3, 8, 3, 5, 1)
    return network


def not_a_network():
    return 3


NUMBER = 3
