"""The `data` section of the configuration: its keys, types and defaults."""

from dataclasses import dataclass, fields

from data.errors import DataError


@dataclass
class Split:
    """One part of a data set, in COCO format. Relative paths are looked up in `$DENSEKD_DATA`."""

    images: str  # folder of the images
    annotations: str  # COCO-format JSON file
    first: int | None = None  # use only so many images, the file's first


@dataclass
class DataConfig:
    train: Split  # what is trained on
    val: Split | None = None  # what is evaluated on
    batch_size: int = 2  # images per process and step
    workers: int = 2  # loader processes per training process; 0 loads in the training process itself
    scale: tuple[int, int] = (1333, 800)  # images are resized to fit it: longest long edge, longest short edge
    multi_scale: list[tuple[int, int]] | None = None  # training draws one of these per image instead of `scale`
    flip: float = 0.5  # probability of a horizontal flip in training
    skip_empty: bool = False  # leave images without boxes out of training
    skip_unreadable: bool = False  # training goes on without images that cannot be read, and counts them in the log
    antialias: bool = False  # smooth when shrinking images; the reference implementations do not
    group_by_aspect: bool = True  # training batches hold only landscape or only portrait images, which saves padding

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise DataError(f"data.{name} must be at least {least}, not {getattr(self, name)}")


def read_data_config(section: DataConfig | dict) -> DataConfig:
    """Turn the `data` section of a configuration into a DataConfig; one that is already passes through.

    Raises DataError for an unknown or a missing key.
    """
    if isinstance(section, DataConfig):
        return section
    section = dict(section)
    for name in ("train", "val"):
        if isinstance(section.get(name), dict):
            section[name] = _fill(Split, section[name], f"data.{name}")
    return _fill(DataConfig, section, "data")


def _fill(kind: type, section: dict, name: str):
    known = [field.name for field in fields(kind)]
    for key in section:
        if key not in known:
            raise DataError(f"unknown key {name}.{key}: valid keys are {', '.join(known)}")
    try:
        return kind(**section)
    except TypeError as error:  # the only one left is a missing argument, which the error names
        raise DataError(f"{name} is incomplete: {error}") from error
