"""Downloads that continue where they were interrupted, with checks of size and checksum, and safe unpacking."""
import hashlib
import http.client
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple
from urllib.error import HTTPError

from tqdm import tqdm

from data.encrypted import UnencryptedAddress, open_encrypted
from data.errors import counted
from data.output import no_room, reason_of, writing

BLOCK = 1 << 20  # bytes
ATTEMPTS = 5  # in a row without a byte
PAUSE = 2.0  # seconds before the second attempt, twice as long before each further one

# Where COCO's own server is reached over https; its other name, images.cocodataset.org, has no certificate.
COCO_SERVER = "https://s3.amazonaws.com/images.cocodataset.org"


class DownloadError(OSError):
    """A download or an archive that is not what it should be, in one line."""

    exit_code = 1


class Archive(NamedTuple):
    """A zip file on a server."""

    path: str  # below the server's address
    size: int  # in bytes
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


COCO_2017 = {
    "annotations": Archive("annotations/annotations_trainval2017.zip", 252907541,
                           "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
    "val": Archive("zips/val2017.zip", 815585330,
                   "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    "train": Archive("zips/train2017.zip", 19336861798,
                     "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
}


def prepare_coco(out: Path, parts: Sequence[str] = tuple(COCO_2017), server: str = COCO_SERVER,
                 keep_archives: bool = False) -> list[str]:
    """Download and unpack COCO 2017 into `out`: train2017/, val2017/ and annotations/.

    Parts that are already unpacked, and bytes that are already downloaded, are skipped.

    Args:
        parts: names in `COCO_2017`.
        server: the address of the folder with the archives.
        keep_archives: leave the zip files in `out`, too.
    Returns: a line for each part.
    Raises DownloadError.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for part in parts:
        archive = COCO_2017[part]
        done, file = out / f".{archive.name}.unpacked", out / archive.name
        if done.exists():
            lines.append(f"{archive.name}: unpacked before")
            continue
        if not file.exists():
            download(f"{server.rstrip('/')}/{archive.path}", file, archive.size, archive.sha256)
        count = unpack(file, out)
        done.touch()
        if not keep_archives:
            file.unlink()
        lines.append(f"{archive.name}: checked, and {counted(count, 'file')} unpacked into {out}")
    return lines


def download(url: str, file: Path, size: int, sha256: str) -> None:
    """Download `url` to `file`, which does not exist before it is complete and correct.

    The bytes so far are in `NAME.partial`; the next call continues after them, if the server can send parts of files.
    Raises DownloadError: no encrypted connection (but to this machine), a server that does not answer or answers
    something else, no room, another size or checksum.
    """
    partial = file.with_name(file.name + ".partial")
    _check_room(file, size - _size(partial))
    with tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
        failures = 0
        while (there := _size(partial)) < size:
            reason = _fetch(url, partial, there, size, bar)
            failures = 0 if _size(partial) > there else failures + 1
            if failures == ATTEMPTS:
                raise DownloadError(f"cannot download {url}: {reason}, after {there} of {size} bytes; the same command "
                                    "goes on there")
            time.sleep(PAUSE * 2 ** (failures - 1) if failures else 0)
    if (found := _size(partial)) != size or (found := checksum(partial)) != sha256:
        partial.unlink()
        expected = size if isinstance(found, int) else sha256
        raise DownloadError(f"the download of {url} has the size or SHA-256 {found}, and should have {expected}: it "
                            "was thrown away; try again, or another server")
    os.replace(partial, file)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _check_room(file: Path, count: int) -> None:
    """Raise DownloadError if there is no room for `count` bytes."""
    free = shutil.disk_usage(file.parent).free
    if free < count:
        raise DownloadError(f"{file} needs {count / 2**30:.1f} GiB, and {file.parent} has {free / 2**30:.1f} GiB free: "
                            "make room, or give another folder")


def _fetch(url: str, partial: Path, there: int, size: int, bar: tqdm) -> str:
    """Append to `partial` what follows its first `there` bytes; returns why the transfer has ended.

    Raises DownloadError if another attempt would be useless.
    """
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
    try:
        with open_encrypted(url, headers) as answer:
            start, total = 0, answer.headers.get("Content-Length")
            if answer.status == 206:
                match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
                start, total = (int(match[1]), match[2]) if match else (-1, None)
            if start not in (0, there):
                raise DownloadError(f"cannot download {url}: the server sent another part than it was asked for")
            if total is not None and total.isdigit() and int(total) != size:
                raise DownloadError(f"cannot download {url}: it has {total} bytes there, and should have {size}")
            bar.reset(size)
            bar.update(start)
            with open(partial, "ab" if start else "wb") as file:  # a server that cannot send parts starts again
                while block := answer.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
        return "the connection ended"
    except DownloadError:
        raise
    except UnencryptedAddress as error:
        raise DownloadError(str(error)) from None
    except HTTPError as error:
        if error.code < 500:  # the next answer would be the same
            raise DownloadError(f"cannot download {url}: {error}") from None
        return str(error)
    except (OSError, http.client.HTTPException) as error:
        if no_room(error):
            raise DownloadError(f"{partial} cannot be written ({reason_of(error)}): make room; the same command goes "
                                "on there") from None
        return str(getattr(error, "reason", error))


def checksum(file: Path) -> str:
    """SHA-256, with a progress bar."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream, tqdm(total=file.stat().st_size, desc=f"checking {file.name}", unit="B",
                                          unit_scale=True, leave=False, disable=None) as bar:
        while block := stream.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def unpack(file: Path, out: Path) -> int:
    """Unpack a zip file into `out`; members that are there in their full size are left as they are.

    Returns: the number of files in it.
    Raises DownloadError, before anything is written: no zip file, a member whose name leads out of `out`, a link; and
    while it is written: a damaged member.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            for info in members:
                _check_member(info, file)
            _check_room(out / file.stem, sum(info.file_size for info in members if not _is_there(info, out)))
            for info in tqdm(members, f"unpacking {file.name}", leave=False, disable=None):
                if _is_there(info, out):
                    continue
                target = out / info.filename
                with writing(target) as partial, archive.open(info) as source, open(partial, "wb") as written:
                    shutil.copyfileobj(source, written, BLOCK)
            return len(members)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"archive {file} is damaged ({error}): delete it, and download it again") from None


def _is_there(info: zipfile.ZipInfo, out: Path) -> bool:
    target = out / info.filename
    return target.is_file() and target.stat().st_size == info.file_size


def _check_member(info: zipfile.ZipInfo, file: Path) -> None:
    name = info.filename
    if any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath)):
        raise DownloadError(f"archive {file} holds {name!r}, which leads out of the folder: nothing of it was unpacked")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DownloadError(f"archive {file} holds {name!r}, which is a link: nothing of it was unpacked")
