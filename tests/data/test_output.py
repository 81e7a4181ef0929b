"""Files that cannot be written, above all on a full disk: one line that names the file, and what was there stays."""
import errno
import os
import re
import resource
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from runs import ROOT, run_script

from data.images import write_picture
from data.inputs.video import VideoWriter
from data.output import OutputError, check_output, no_room, write_bytes, write_text, writing
from data.sources import download
from kd import cli
from kd.engine.loggers.board import Board
from kd.exceptions import TrainingError
from kd.work_dir.checkpoint import save_checkpoint
from kd.work_dir.log import Metrics, open_log
from models.checkpoints import convert, sources

LIMIT = 20_000  # bytes of a file on the small disk
NOISE = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@contextmanager
def small_disk():
    """No file can become larger than LIMIT; the system refuses it as it does on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def convert_weights(path):
    source = path.parent.parent / "source.pth"
    convert.convert_checkpoint(source, "mmdet", path)


def write_video(path):
    pytest.importorskip("av", reason="needs the extra video")
    with writing(path) as partial, VideoWriter(partial, Fraction(25)) as video:
        for _ in range(20):
            video.write(NOISE)


def plot(path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the extra viz")
    figure, axes = pyplot.subplots()
    axes.imshow(NOISE.permute(1, 2, 0).numpy())
    with writing(path) as partial:
        figure.savefig(partial, format="png")


WRITERS = {
    "a.txt": lambda path: write_text(path, "ü" * LIMIT),
    "a.bin": lambda path: write_bytes(path, bytes(2 * LIMIT)),
    "a.png": lambda path: write_picture(path, NOISE),
    "a.jpg": lambda path: write_picture(path, NOISE),
    "last.pth": lambda path: save_checkpoint(path, {"model": {"w": torch.zeros(LIMIT)}}),
    "mmdet.pth": convert_weights,
    "plot.png": plot,
    "a.mp4": write_video}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(tmp_path, name):
    torch.save({"w": torch.zeros(LIMIT)}, tmp_path / "source.pth")
    path = tmp_path / "out" / name
    write_bytes(path, b"before")
    with small_disk(), pytest.raises((OutputError, TrainingError)) as caught:
        WRITERS[name](path)
    assert str(caught.value).startswith(f"{path} cannot be written (larger than files may be here): ")
    assert "\n" not in str(caught.value) and "make room" in str(caught.value)
    assert [file.name for file in path.parent.iterdir()] == [name] and path.read_bytes() == b"before"
    assert cli.explain(caught.value) == (1, f"error: {caught.value}")
    WRITERS[name](path)  # with room
    assert path.read_bytes() != b"before" and [file.name for file in path.parent.iterdir()] == [name]


def test_the_words_for_a_full_disk(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OutputError) as caught:
        write_text(tmp_path / "a.json", "{}")
    assert str(caught.value) == f"{tmp_path / 'a.json'} cannot be written (disk full): give another path, or make room"
    assert cli.explain(OSError(errno.ENOSPC, "No space left on device")) == (
        1, "error: what this command prints cannot be written (disk full): make room")


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    file, link = tmp_path / "file.json", tmp_path / "link.json"
    file.write_text("before")
    link.symlink_to(file)
    for path in (file, link, tmp_path / "new" / "folder" / "a.json", Path(os.devnull)):
        check_output(path)
    for path in (tmp_path, tmp_path / "new" / "folder"):
        check_output(path, folder=True)
    assert file.read_text() == "before" and not (tmp_path / "new").exists()
    for path, folder, reason in [(tmp_path, False, errno.EISDIR), (file / "a.json", False, errno.ENOTDIR),
                                 (file, True, errno.ENOTDIR), (link / "folder", True, errno.ENOTDIR)]:
        with pytest.raises(OutputError) as caught:
            check_output(path, folder)
        assert caught.value.exit_code == 2 and str(caught.value).startswith(
            f"{path} cannot be written ({os.strerror(reason)}): give another path")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for path in (tmp_path / "new" / "a.json", file):
        with pytest.raises(OutputError, match="Permission denied"):
            check_output(path)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")
                                          if '"--out"' in path.read_text(encoding="utf-8")))
def test_every_script_checks_its_output_first(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    command = ["yolo"] if script == "prepare_data.py" else []
    assert run_script(monkeypatch, script, *command, "--out", tmp_path / "file" / "a") == 2
    assert f"argument --out: {tmp_path / 'file' / 'a'} cannot be written (Not a dir" in capsys.readouterr().err


def test_an_error_that_is_about_something_else_stays(tmp_path):
    for error in (RuntimeError("shapes differ"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "a") as partial:
            partial.write_text("half")
            raise error
        assert caught.value is error and not list(tmp_path.iterdir())
    assert no_room(error) is None


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    with pytest.raises(OutputError, match=f"{tmp_path} cannot be written .Is a directory"):
        write_text(tmp_path, "text")


def test_logs_that_grow(tmp_path):
    """What was written before stays; the error comes from the record that has no room."""
    metrics, log = Metrics(tmp_path / "metrics.jsonl"), open_log(tmp_path, 0)
    printer = log.handlers[0]
    log.removeHandler(printer)
    for name, write in (("metrics.jsonl", lambda: metrics.write({"step": 1})), ("train.log", lambda: log.info("x"))):
        with small_disk(), pytest.raises(OutputError) as caught:
            for _ in range(LIMIT):
                write()
        assert str(caught.value).startswith(f"{tmp_path / name} cannot be written (larger than")
        assert (tmp_path / name).stat().st_size == LIMIT


def test_tensorboard(tmp_path, capfd):
    pytest.importorskip("tensorboard", reason="needs the extra viz")
    board = Board(None, tmp_path, 0, torch.device("cpu"))
    with small_disk(), pytest.raises(OutputError) as caught:
        for step in range(LIMIT):
            board.show({"step": step, "loss": 1.0})
    assert str(caught.value).startswith(f"{tmp_path / 'tensorboard'} cannot be written (larger than")
    assert "Traceback" not in capfd.readouterr().err


def test_downloads(tmp_path, monkeypatch):
    """They are not tried again, as after a broken connection."""
    class Answer:
        status, headers = 200, {}
        read = staticmethod(lambda size: bytes(LIMIT + 1))
        __enter__ = __exit__ = lambda self, *error: self if not error else None

    monkeypatch.setattr(download, "open_encrypted", lambda *arguments: Answer())
    monkeypatch.setattr(sources, "open_encrypted", lambda *arguments: Answer())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for fetch in (lambda: download.download("https://x.org/a.zip", tmp_path / "a.zip", 10 ** 6, ""),
                  lambda: sources.local_path("https://x.org/a.pth")):
        with small_disk(), pytest.raises((download.DownloadError, OutputError)) as caught:
            fetch()
        assert re.match(r"/.*/a.(zip.partial|pth) cannot be written .larger than", str(caught.value))
        assert cli.explain(caught.value)[0] == 1


def test_generated_data(tmp_path, monkeypatch, capsys):
    with small_disk():
        code = run_script(monkeypatch, "generate_data.py", "--out", tmp_path / "scenes", "--train", "80", "--val", "1")
    file = tmp_path / "scenes" / "annotations" / "train.json"
    assert code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {file} cannot be written (")
    assert not file.exists()


def test_every_file_is_written_with_these_functions():
    """A writer of its own would leave half a file, or a traceback, on a full disk."""
    direct = re.compile(r"\.write_(text|bytes)\(|write_(jpeg|png)\(|savefig\(|(torch|onnx|export)\.save\(|"
                        r"""open\([^#]*["'][wax]\+?b?["']""")
    allowed = re.compile(r"\bpartial\b|\bnaming\(|, file[,)]")
    exceptions = {("data/inputs/video.py", "_av.open("), ("data/shared.py", 'open(path, "a")'),
                  ("data/shared.py", 'open(path, "wb", buffering=0)'),
                  ("data/results/shared.py", "self.file: IO[bytes]"),
                  ("kd/evaluation/quantize.py", "onnx.save("), ("kd/cache/store.py", "lambda path: path.write_text")}
    found = []
    for folder in ("kd", "data", "models", "losses", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            found += [f"{name}: {line.strip()}" for line in path.read_text(encoding="utf-8").splitlines()
                      if direct.search(line) and not allowed.search(line) and name != "data/output.py"
                      and not any(name == other and part in line for other, part in exceptions)]
    assert not found
