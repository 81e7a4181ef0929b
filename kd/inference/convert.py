"""Checkpoints for other projects and for publication, with the configuration that goes with them."""
import logging
from collections.abc import Mapping
from pathlib import Path

from data import DataError
from data.output import write_text
from models import ConfigError
from models.checkpoints.classes import checkpoint_classes, known_classes
from models.checkpoints.convert import convert_checkpoint
from models.checkpoints.formats import Checkpoint
from models.checkpoints.zoo import published_config
from models.weights import CheckpointError, open_checkpoint

from ..config import Config, load_config, parse_config
from ..work_dir.model_card import NAME, find_origin, model_card

log = logging.getLogger("densekd")


def convert(checkpoint: str, to: str, out: Path, part: str | None = None, cfg: Config | None = None) -> list[str]:
    """Convert a checkpoint, see `convert_checkpoint`; beside a .safetensors file, write a page about the detector.

    Args:
        cfg: the configuration of the checkpoint; by default the one that it holds, or that of `zoo:NAME`.
    Returns:
        A line for each file that was written.
    Raises:
        ConfigError, CheckpointError, MissingExtra, OutputError: bad input, or a path that cannot be written.
    """
    if to in ("mmdet", "student"):
        return [convert_checkpoint(checkpoint, to, out, part)]
    content = open_checkpoint(checkpoint, part)[1]
    own = own_config(checkpoint, content, needed=cfg is None)
    config = cfg or published_settings(checkpoint, to) or own
    classes = class_names(content, config)
    lines = [convert_checkpoint(checkpoint, to, out, part, config, classes)]
    if to == "safetensors":
        if config is None:
            log.warning(f"{checkpoint} holds no configuration, so {out} has none, and needs --cfg wherever it is used; "
                        "convert.py --cfg gives it one")
        origin = find_origin(checkpoint, own)
        page = out.parent / NAME
        write_text(page, model_card(out, content.weights, config, classes, origin))
        lines.append(f"wrote {page}")
    return lines


def published_settings(checkpoint: str, to: str) -> Config | None:
    """The configuration of `zoo:NAME`; None for others, and for one whose classes a map selects: a file that holds a
    configuration has no such map."""
    path = published_config(checkpoint)
    found = None if path is None else load_config(path)
    return None if found is not None and to == "safetensors" and found.eval.class_map is not None else found


def own_config(checkpoint: str, content: Checkpoint, needed: bool) -> dict | None:
    """The configuration in a checkpoint, or None if it holds none, or one that this version cannot read and that is not
    needed; otherwise that is a CheckpointError."""
    if content.config is None:
        return None
    try:
        parse_config(content.config)
    except (ConfigError, DataError) as error:
        if needed:
            raise CheckpointError(f"the configuration in checkpoint {checkpoint} cannot be used, {error}: give --cfg"
                                  ) from None
        return None
    return content.config


def class_names(content: Checkpoint, config: Mapping | None) -> list[str] | None:
    """The names of a checkpoint's classes, or None if one is not known."""
    own = checkpoint_classes(content.meta)
    head = ((config or {}).get("model") or {}).get("head") or {}
    if own is not None or not head.get("num_classes"):
        return own
    found = known_classes(content, head["num_classes"])
    return None if found is None or None in found[0] else list(found[0])
