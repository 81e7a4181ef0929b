"""Reads and writes what the methods need of one frozen teacher."""
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.digests import digest, mirror_batch
from data.shared import START, Damaged, padded
from models import ConfigError, Detector, DetectorPass

from .entry import DTYPES, Layout, Part, is_dense, read_start, read_tensors
from .fingerprint import all_settings, machine
from .needs import Needs, expected_names, named_tensors, rebuilt
from .store import Store, fingerprint, open_folder

log = logging.getLogger("densekd")

READERS = 4   # threads that read the images of a batch
AHEAD = 8     # batches that are in memory before they are needed, at most


class Found(NamedTuple):
    """What is stored of a batch."""

    missing: list[int]           # the images without a good entry
    layout: Layout | None        # None if an image is missing
    tensors: list[Tensor] | None  # flat, one for each part, with all images


class TeacherCache:
    """Answers of one teacher, by image.

    An entry belongs to the pixels that the detectors get, with their padding, and to the number of images in the batch:
    all of them can change the last digits. If one image of a batch has no entry, the teacher runs on the whole batch,
    as it does without a cache, and then on its mirror image, if training flips images. So losses are the same to the
    last bit, whether answers are computed or read (in fp32, on a CPU).

    Args:
        root: the folder that has a folder for each fingerprint.
        needs: what is stored.
        given: what the configuration says about the answers, see `all_settings`.
        precision: fp32 stores values as they are computed; fp16 rounds those of 32 and more bits to 16.
        amp: the `train.amp` setting.
    """

    def __init__(self, root: Path, student: Detector, teacher: Detector, needs: Needs, given: Mapping,
                 precision: str = "fp32", amp: str = "none"):
        self.root, self.teacher, self.needs, self.given = root, teacher, needs, given
        self.precision, self.amp, self.writes = precision, amp, True
        self.names = expected_names(needs, teacher)
        self.describe_settings = lambda: all_settings(given, student, teacher, needs)
        self.store: Store | None = None
        self.settings: dict = {}
        self.opened_for: tuple | None = None
        self.read = self.computed = 0  # images
        self.warned = False
        self._ahead: dict[tuple[str, ...], Future] = {}

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.teacher.parameters())
        return weight.device, weight.dtype

    def open(self) -> list[str]:
        """Open the folder of the teacher's fingerprint; it is created unless `writes` is false.

        Returns:
            Lines for people.
        Raises:
            OutputError: the folder cannot be written.
        """
        self.opened_for = self.place
        self.settings = self.describe_settings()
        folder, lines = open_folder(self.root, self.settings, machine(self.opened_for[0]), self.writes)
        self.store = Store(folder)
        self._reader, self._rows = ThreadPoolExecutor(1, "answers"), ThreadPoolExecutor(READERS, "answers-in")
        return lines

    def stored_layouts(self) -> list[bool]:
        """Whether there are answers in channels_last, in the other memory layout, or in both; all else must fit."""
        settings = self.describe_settings()
        both = {layout: fingerprint(settings | {"numbers": settings["numbers"] | {"channels_last": layout}})
                for layout in (True, False)}
        return [layout for layout, name in both.items() if any((self.root / name).glob("*/*.bin"))]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)

    def opened(self) -> Store:
        """The store; it is opened when it is first needed, and again if the teacher has moved since."""
        if self.opened_for != self.place:
            for line in self.open():
                log.warning(line)
        return self.store

    # --- reading ---

    def read_ahead(self, targets: Sequence[Mapping]) -> None:
        """Begin to read the answers for a batch whose targets have a `digest`."""
        self.opened()
        keys = keys_of(None, targets)
        if len(self._ahead) < AHEAD:
            self._ahead[keys] = self._reader.submit(self.find, keys)

    def finish(self) -> None:
        """Wait until all answers are written, and forget what was read ahead in vain."""
        self.opened().flush()
        self._ahead.clear()

    def find(self, keys: Sequence[str]) -> Found:
        """Read the entries of a batch, if all of them are there."""
        paths = [self.store.path(key) for key in keys]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if missing:
            return Found(missing, None, None)
        with ExitStack() as stack:
            starts, missing, first = {}, [], None
            for i, path in enumerate(paths):
                try:
                    file = stack.enter_context(open(path, "rb", buffering=0))
                    starts[i] = file, *read_start(file, path.stat().st_size)
                    first = first or starts[i][1]
                    self._check(starts[i][1], first)
                except (Damaged, OSError) as error:
                    self._warn(path, error)
                    missing.append(i)
            if missing:
                return Found(missing, None, None)
            layout, pin = first, self.opened_for[0].type == "cuda"
            tensors = [torch.empty(len(keys) * part.count, dtype=DTYPES[part.stored], pin_memory=pin)
                       for part in layout.parts]

            def read(i: int) -> bool:
                try:
                    file, _, total = starts[i]
                    read_tensors(file, layout, total, [tensor[i * part.count:(i + 1) * part.count]
                                                       for tensor, part in zip(tensors, layout.parts)])
                except (Damaged, OSError) as error:
                    self._warn(paths[i], error)
                    return False
                return True

            good = list(self._rows.map(read, range(len(keys))))
        missing = [i for i, is_good in enumerate(good) if not is_good]
        return Found(missing, None, None) if missing else Found([], layout, tensors)

    def _check(self, layout: Layout, first: Layout) -> None:
        if {name for name, _ in layout.names} != self.names:
            raise Damaged("it holds other tensors than those that are needed")
        if layout != first:
            raise Damaged("its tensors have other shapes than those of the same size before it")

    def _warn(self, path: Path, error: Exception) -> None:
        if not self.warned:
            log.warning("%s is damaged (%s): the teacher answers again, for others like it without a warning", path,
                        getattr(error, "strerror", None) or error)
        self.warned = True

    # --- answers ---

    @torch.no_grad()
    def answer(self, images: Tensor, targets: list[dict], convert: Callable[[], Tensor],
               run: Callable[[Tensor], DetectorPass]) -> DetectorPass:
        """What is needed of the teacher's pass over a batch: read if it is stored, otherwise computed and stored.

        Args:
            images: (N, 3, H, W), normalised for the student.
            targets: with a `digest` each, from the loader; otherwise it is made from `images`. If they have a
                `mirrored` as well, the answers for the mirror images are computed and stored at the same time.
            convert: gives the images as the teacher gets them.
            run: runs the teacher on the whole batch, or on its mirror image, normalised for the student.
        Raises:
            ConfigError: the surrounding code has another precision than `train.amp` says.
        """
        self._check_autocast(images.device)
        store, keys = self.opened(), keys_of(images, targets)
        ahead = self._ahead.pop(keys, None)
        missing, layout, tensors = ahead.result() if ahead else self.find(keys)
        if layout is not None:
            self.read += len(keys)
            found = self._on_device(layout, tensors, len(keys), images.device)
            return rebuilt(found, layout.sizes, self.needs, self.teacher, convert(), targets)
        self.computed += len(keys)
        answer = self._compute(store, keys, missing, run(images))
        mirrored = keys_of(None, targets, "mirrored") if "mirrored" in targets[0] else ()
        missing = [i for i, key in enumerate(mirrored) if not store.path(key).exists()]
        if missing and self.writes and not store.stopped:  # now: else most batches would miss some of them for long
            self.computed += len(keys)
            self._compute(store, mirrored, missing, run(mirror_batch(images, targets)))
        return answer

    def _compute(self, store: Store, keys: Sequence[str], missing: Sequence[int], seen: DetectorPass) -> DetectorPass:
        """What is needed of a pass, as it will be read; the missing images of it are stored."""
        found = {name: dense(tensor) for name, tensor in named_tensors(seen, self.needs).items()}
        sizes = tuple(map(tuple, seen.outputs.sizes)) if self.needs.head else ()
        layout, distinct = self.layout_of(found, sizes)
        stored = [tensor.to(DTYPES[part.stored]) for part, tensor in zip(layout.parts, distinct)]
        if self.writes and not store.stopped:
            self._keep(store, layout, stored, {keys[i]: i for i in missing})
        used = [tensor if part.stored == part.used else torch.where(half.isfinite(), half.to(tensor.dtype), tensor)
                for part, tensor, half in zip(layout.parts, distinct, stored)]
        return rebuilt({name: used[number] for name, number in layout.names}, sizes, self.needs, self.teacher,
                       seen.images, seen.targets)

    @torch.no_grad()
    def entry_size(self, size: tuple[int, int], batch: int) -> int:
        """The bytes of an image's entry, from a run of the teacher on a batch of empty images of (h, w).

        Raises:
            ConfigError: what methods need cannot be stored image by image.
        """
        device, dtype = self.place
        images = torch.zeros(batch, 3, *size, device=device, dtype=dtype)
        seen = self.teacher.run(images, [{"image_size": size}] * batch, *self.needs[2:], with_head=self.needs.head)
        found = {name: dense(tensor) for name, tensor in named_tensors(seen, self.needs).items()}
        layout, _ = self.layout_of(found, tuple(map(tuple, seen.outputs.sizes)) if self.needs.head else ())
        return layout.size + padded(START.size + len(layout.header()))

    def layout_of(self, found: Mapping[str, Tensor], sizes: tuple) -> tuple[Layout, list[Tensor]]:
        """The layout of an image's entry, and the tensors (N, ...) in it; a tensor under several names is there once.
        """
        distinct = list({id(tensor): tensor for tensor in found.values()}.values())
        numbers = {id(tensor): number for number, tensor in enumerate(distinct)}
        parts = tuple(self._part(tensor) for tensor in distinct)
        return Layout(parts, tuple((name, numbers[id(tensor)]) for name, tensor in found.items()), sizes), distinct

    def _part(self, tensor: Tensor) -> Part:
        used = str(tensor.dtype).removeprefix("torch.")
        rounds = self.precision == "fp16" and used in ("float32", "float64")
        return Part(tuple(tensor.shape[1:]), tensor.stride()[1:], "float16" if rounds else used, used)

    def _keep(self, store: Store, layout: Layout, tensors: list[Tensor], rows: Mapping[str, int]) -> None:
        """Copy some images' tensors to the CPU without waiting, and have them written."""
        on_gpu = tensors[0].device.type == "cuda"
        copies = {key: [torch.empty(part.count, dtype=tensor.dtype, pin_memory=on_gpu)
                        for part, tensor in zip(layout.parts, tensors)] for key in rows}
        for key, row in rows.items():
            for part, tensor, copy in zip(layout.parts, tensors, copies[key]):
                part.batch(copy, 1)[0].copy_(tensor[row], non_blocking=on_gpu)
        ready = None
        if on_gpu:
            ready = torch.cuda.Event()
            ready.record()
        for key, copy in copies.items():
            store.write(key, layout, copy, ready)

    def _on_device(self, layout: Layout, tensors: list[Tensor], images: int, device: torch.device
                   ) -> dict[str, Tensor]:
        moved = [part.batch(tensor.to(device, non_blocking=device.type == "cuda").to(DTYPES[part.used]), images)
                 for part, tensor in zip(layout.parts, tensors)]
        return {name: moved[number] for name, number in layout.names}

    def _check_autocast(self, device: torch.device) -> None:
        active = torch.is_autocast_enabled(device.type)
        name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(torch.get_autocast_dtype(device.type))
        if (name if active else "none") != self.amp:
            raise ConfigError("distill.cache", f"holds answers for train.amp={self.amp}, and the surrounding code has "
                                               f"{name if active else 'none'}: use the precision of train.amp")


def keys_of(images: Tensor | None, targets: Sequence[Mapping], name: str = "digest") -> tuple[str, ...]:
    """The keys of a batch's entries: the digest of each image, and the number of images."""
    with suppress(KeyError):
        return tuple(f"{target[name]}-{len(targets)}" for target in targets)
    return tuple(f"{digest(image, target['image_size'])}-{len(targets)}" for image, target in zip(images, targets))


def dense(tensor: Tensor) -> Tensor:
    """The tensor (N, ...), copied if an image's part of it has gaps in memory or stands between those of others."""
    one = tensor[0]
    return tensor if is_dense(one.shape, one.stride()) and (
        len(tensor) == 1 or tensor.stride(0) == one.numel()) else tensor.contiguous()
