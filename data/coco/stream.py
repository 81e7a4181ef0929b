"""Parses COCO files piece by piece, so that the content of a large one is never in memory as a whole."""
import codecs
import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO

WHOLE = 2 ** 23    # bytes; smaller files are parsed in one go
BLOCK = 2 ** 22    # bytes that are read at a time
LISTS = ("images", "annotations")  # the lists that may be too long for memory

Visit = Callable[[str, list | None], None]
_scan = json.JSONDecoder().scan_once
_spaces = re.compile(r"[ \t\n\r]*").match
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match


class Entries:
    """A list in a file. It is parsed again each time that it is iterated over."""

    def __init__(self, path: Path, start: int, count: int):
        self.path, self.start, self.count = path, start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        with open(self.path, "rb") as file:
            for piece in JsonText(file, self.start).entries():
                yield from piece


def parse(path: Path, visit: Visit = lambda key, entries: None, digest: Any = None) -> Any:
    """The content of a JSON file; in a large object, lists named in LISTS are `Entries`.

    Args:
        visit: called with the name of such a list and None when it starts, then with its name and the next entries. A
            name that is there twice starts twice; the second list counts.
    Raises OSError; ValueError and RecursionError for what is not JSON, as `json` does.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        # Not UTF-8, or with a mark at its start: rare.
        if path.stat().st_size >= WHOLE and json.detect_encoding(start) == "utf-8" and start.lstrip()[:1] == b"{":
            return JsonText(file, 0, digest).object(path, visit)
        whole = start + file.read()
    if digest is not None:
        digest.update(whole)
    content = json.loads(whole)
    for key in LISTS:
        if isinstance(content, dict) and isinstance(content.get(key), list):
            visit(key, None)
            visit(key, content[key])
    return content


class JsonText:
    """The text of a JSON file from a byte on, of which a part is in memory.

    Attributes: `text`, this part; `at`, the place in it up to which it is parsed.
    """

    def __init__(self, file: BinaryIO, start: int, digest: Any = None):
        file.seek(start)
        self.digest = digest
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self.text, self.at, self.ended = "", 0, False
        self.bytes = start          # before the part, as are the next two
        self.chars = self.lines = 0
        self.line_start = 0         # the place, from the start of the file, at which the line of `text[0]` starts

    def more(self) -> None:
        """Read at least one more block, and twice as much as is waiting to be parsed; forget what is parsed."""
        done = self.text[:self.at]
        self.bytes += len(done.encode("utf-8", "surrogatepass"))
        if "\n" in done:
            self.lines, self.line_start = self.lines + done.count("\n"), self.chars + done.rindex("\n") + 1
        self.chars += self.at
        block = self.file.read(max(BLOCK, len(self.text) - self.at))
        self.ended = not block
        if self.digest is not None:
            self.digest.update(block)
        self.text, self.at = self.text[self.at:] + self.decoder.decode(block, final=self.ended), 0

    def fail(self, message: str, at: int) -> None:
        """Raise the error that `json` has for a place in `text`."""
        lines, last = self.text.count("\n", 0, at), self.text.rfind("\n", 0, at)
        start = self.line_start if last < 0 else self.chars + last + 1
        raise ValueError(f"{message}: line {self.lines + lines + 1} column {self.chars + at - start + 1} "
                         f"(char {self.chars + at})")

    def next(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            self.at = _spaces(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self.more()

    def take(self, mark: str, message: str) -> None:
        """Go over a mark, which must come next."""
        if self.next() != mark:
            self.fail(message, self.at)
        self.at += 1

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                value, end = _scan(self.text, self.at)
                if self.ended or end < len(self.text) - 3:  # else the next block may go on with a number, as 1 and e-9
                    self.at = end
                    return value
            except StopIteration as error:
                message, place = "Expecting value", error.value
            except JSONDecodeError as error:
                message, place = error.msg, error.pos
            else:
                message, place = "", len(self.text)
            # An error far from the end is one of the file; near it, the value may go on in the next block.
            if self.ended or (place < len(self.text) - 16 and not message.startswith("Unterminated string")):
                self.fail(message, place)
            self.more()

    def entries(self) -> Iterator[list]:
        """The values of a list whose start is parsed, in pieces."""
        if self.next() == "]":
            self.at += 1
            return
        while True:
            piece, text, at = [], self.text, self.at
            try:
                while True:  # almost all entries: those that are whole in this part, with a comma behind them
                    entry, end = _scan(text, at)
                    comma = _comma(text, end)
                    if comma is None:
                        break
                    piece.append(entry)
                    at = comma.end()
            except (StopIteration, JSONDecodeError):
                pass
            self.at = at
            piece.append(self.value())
            closed = self.next() == "]"
            if not closed:
                self.take(",", "Expecting ',' delimiter")
                self.next()
            self.at += closed
            yield piece
            if closed:
                return

    def object(self, path: Path, visit: Visit) -> dict:
        """The whole file, which is an object, see `parse`."""
        self.take("{", "Expecting value")
        content, name_wanted = {}, "Expecting property name enclosed in double quotes"
        closed = self.next() == "}"
        while not closed:
            if self.next() != '"':
                self.fail(name_wanted, self.at)
            key = self.value()
            self.take(":", "Expecting ':' delimiter")
            if self.next() == "[" and key in LISTS:
                self.at += 1
                start, count = self.bytes + len(self.text[:self.at].encode("utf-8", "surrogatepass")), 0
                visit(key, None)
                for piece in self.entries():
                    count += len(piece)
                    visit(key, piece)
                content[key] = Entries(path, start, count)
            else:
                content[key] = self.value()
            closed = self.next() == "}"
            if not closed:
                self.take(",", "Expecting ',' delimiter")
        self.at += 1
        if self.next():
            self.fail("Extra data", self.at)
        return content


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause garbage collection, which would search millions of small objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
