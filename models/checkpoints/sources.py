"""Finds a checkpoint by its path, its URL or a name for a URL. Downloads go to torch hub's cache."""
import hashlib
import http.client
import os
from contextlib import suppress
from difflib import get_close_matches
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4

import torch
from tqdm import tqdm

from data.encrypted import UnencryptedAddress, check_encrypted, open_encrypted
from data.errors import one_line
from data.output import OutputError, no_room, reason_of

from .safetensors_file import check_installed
from .unpickler import CheckpointError
from .zoo import PREFIX, checksum, published

_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_OPEN_MMLAB_FOLDER = "https://download.openmmlab.com/pretrain/third_party/"
_OPEN_MMLAB = {  # mmcv's names of backbones that are here too
    "detectron/resnet50_caffe": "resnet50_caffe-788b5fa3.pth",
    "detectron/resnet101_caffe": "resnet101_caffe-3ad79236.pth",
    "detectron2/resnet50_caffe": "resnet50_msra-5891d200.pth",
    "detectron2/resnet101_caffe": "resnet101_msra-6cc46731.pth",
    "detectron2/resnext101_32x8d": "resnext101_32x8d-1516f1aa.pth",
    "resnext50_32x4d": "resnext50-32x4d-0ab1a123.pth",
    "resnext101_32x4d": "resnext101_32x4d-a5af3160.pth",
    "resnext101_64x4d": "resnext101_64x4d-ee2c6f71.pth",
}


def local_path(source: str | os.PathLike) -> str:
    """The file behind `source`: a path as it is, or a URL's file in torch hub's cache, downloaded if need be.

    Downloads come over https; http is for servers on this machine only. Besides URLs it knows these names:
    - `zoo:gfl_r101_2x` and the other published detectors of `zoo.ZOO`;
    - `torchvision://resnet50`, or any other classification model there: its `IMAGENET1K_V1` weights, as in mmdet's
      configurations, and torchvision's default ones where it has no such version (`regnet_y_128gf`, `vit_h_14`);
      `torchvision://resnet50/IMAGENET1K_V2` and `torchvision://resnet50/DEFAULT` say which;
    - `torchvision-detector://fasterrcnn_resnet50_fpn_v2`, with or without a version, for its detectors;
    - `detectron2://ImageNetPretrained/MSRA/R-50.pkl`;
    - `open-mmlab://detectron2/resnet50_caffe` and the other keys of `_OPEN_MMLAB`.
    Raises `CheckpointError` for an unknown name, a plain http address, and if the download fails or does not have the
    checksum in its name; `OutputError` if the disk is full; `MissingExtra` for an address of a `.safetensors` file
    without the package that reads it.
    """
    source = os.fspath(source)
    check_installed(source)
    if entry := published(source):
        return _download(entry.url)
    scheme, separator, name = source.partition("://")
    if not separator:
        return os.path.expanduser(source)
    if scheme.lower() in ("http", "https"):
        return _download(source)
    if scheme in ("torchvision", "torchvision-detector"):
        return _download(torchvision_url(name, detector=scheme == "torchvision-detector"))
    if scheme == "detectron2":
        return _download(_DETECTRON2 + name)
    if scheme == "open-mmlab":
        if name not in _OPEN_MMLAB:
            known = ", ".join(f"open-mmlab://{name}" for name in _OPEN_MMLAB)
            raise CheckpointError(f"unknown checkpoint {source}: known are {known}")
        return _download(_OPEN_MMLAB_FOLDER + _OPEN_MMLAB[name])
    raise CheckpointError(f"unknown kind of checkpoint address: {one_line(source)}")


def is_address(source: str | os.PathLike) -> bool:
    """Whether `source` is a URL or a name for one, not a path."""
    return "://" in os.fspath(source) or os.fspath(source).startswith(PREFIX)


def check_file(source: str | os.PathLike) -> None:
    """Raise CheckpointError for a path where there is no file, or an unknown name `zoo:...`, and MissingExtra for a
    `.safetensors` file without the package that reads it; it downloads nothing."""
    source = os.fspath(source)
    published(source)
    if not is_address(source) and not os.path.exists(os.path.expanduser(source)):
        raise CheckpointError(f"no such checkpoint file: {source}")
    check_installed(source)


def torchvision_url(name: str, detector: bool = False) -> str:
    """The address of torchvision's weights `MODEL` or `MODEL/VERSION`, of a classification model or of a detector."""
    import torchvision  # here, because a local file does not need its models

    model, _, version = name.partition("/")
    module = torchvision.models.detection if detector else torchvision.models
    known = torchvision.models.list_models(module=module)
    if model not in known:
        near = get_close_matches(model, known, 1) or known
        raise CheckpointError(f"torchvision has no {'detector' if detector else 'classification model'} "
                              f"{one_line(model, 60)!r}; known: {', '.join(near)}")
    versions = torchvision.models.get_model_weights(model).__members__  # DEFAULT is among them, as an alias
    version = version or ("IMAGENET1K_V1" if "IMAGENET1K_V1" in versions else "DEFAULT")
    if version not in versions:
        raise CheckpointError(f"torchvision has no weights {one_line(version, 60)!r} of {model}; known: "
                              f"{', '.join(versions)}")
    return versions[version].url


def _download(url: str) -> str:
    path, expected = _cache_entry(url)
    try:
        check_encrypted(url)
        if os.path.isfile(path) and _is_right(path, expected):
            return path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _fetch(url, path, expected)
    except CheckpointError:
        raise
    except UnencryptedAddress as error:
        raise CheckpointError(str(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if cause := no_room(error):
            raise OutputError(f"{path} cannot be written ({reason_of(cause)}): make room for this download") from cause
        reason = one_line(getattr(error, "reason", None) or error)
        raise CheckpointError(f"cannot download {url}: {reason}; without network, put the file at {path}") from error
    return path


def _is_right(path: str, expected: str | None) -> bool:
    """Whether a cached file still has the checksum in its name: another program may have cut it off."""
    return expected is None or file_hash(path).startswith(expected)


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(url: str, path: str, expected: str | None) -> None:
    """Write a URL's file to a temporary one, and move that to `path` when it is complete and its checksum is right."""
    partial, digest, done = f"{path}.{uuid4().hex}.partial", hashlib.sha256(), 0
    try:
        answer = open_encrypted(url)
        size = int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(total=size or None, desc=os.path.basename(path), unit="B", unit_scale=True)
        with answer, bar, open(partial, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                digest.update(block)
                done += len(block)
                bar.update(len(block))
        if size and done != size:
            raise OSError(f"the connection ended after {done} of {size} bytes")
        if expected and not digest.hexdigest().startswith(expected):
            raise CheckpointError(f"the download of {url} does not have the checksum in its name: {expected} is "
                                  f"expected, and it has {digest.hexdigest()[:len(expected)]}")
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)


def _cache_entry(url: str) -> tuple[str, str | None]:
    """The path of a URL's file in the cache, and the checksum in its name.

    A name with a checksum is the file's own. Others (two different backbones are called R-50.pkl) lie in folders as on
    their server, and in one more for the query of the address (`?id=...`), which may choose the file.
    """
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"{one_line(url)} is not an address: {error}") from None
    # An escaped slash is part of a name; so is what comes after a semicolon, which may choose the file.
    parts = [quote(part, safe=" +=@") for part in map(unquote, address.path.split("/")) if part not in ("", ".", "..")]
    if not parts:
        raise CheckpointError(f"no file name in {one_line(url)}")
    expected = checksum(parts[-1])
    folders = [] if expected else [quote(address.netloc.rpartition("@")[2].replace(":", "_")), *parts[:-1]]
    if address.query and not expected:
        folders.append(f"query {hashlib.sha256(address.query.encode()).hexdigest()[:16]}")
    return os.path.join(torch.hub.get_dir(), "checkpoints", *folders, parts[-1]), expected
