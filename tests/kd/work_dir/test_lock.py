"""The lock of a work dir."""
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kd.exceptions import WorkDirError
from kd.work_dir import lock
from kd.work_dir.lock import open_work_dir

# The module alone, without torch; the child stands for a loader's worker, which may outlive the run.
HOLD = """
import os, pathlib, sys, time, types
room = pathlib.Path(sys.argv[1]).parent
for name, folder in (("kd", room.parent), ("kd.work_dir", room)):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]
from kd.work_dir.lock import open_work_dir
lock = open_work_dir(pathlib.Path(sys.argv[2]))
if not os.fork():
    os.write(1, b"%d" % os.getpid())
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`, and has a child that does not."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock.__file__, tmp_path], stdout=subprocess.PIPE)
    child = int(os.read(process.stdout.fileno(), 20))
    yield process
    for number in (process.pid, child):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def test_the_second_run_is_refused(holder, tmp_path):
    with pytest.raises(WorkDirError) as caught:
        open_work_dir(tmp_path)
    assert str(caught.value) == f"another run is at work in {tmp_path}: wait until it ends, or give another --work-dir"
    with open_work_dir(tmp_path, lock=False):  # another process of the same run
        pass
    with open_work_dir(tmp_path / "other"):
        pass


def test_a_killed_run_leaves_no_lock_though_a_child_lives_on(holder, tmp_path):
    holder.kill()
    holder.wait()
    with open_work_dir(tmp_path):
        pass


def test_the_lock_is_given_back_at_the_end(tmp_path):
    for _ in range(2):
        with open_work_dir(tmp_path / "deep" / "run"):
            with pytest.raises(WorkDirError, match="another run"):
                open_work_dir(tmp_path / "deep" / "run")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "run.lock").mkdir(parents=True)
    for folder, reason in [(tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory"),
                           (tmp_path / "run", "Is a directory")]:
        with pytest.raises(WorkDirError) as caught:
            open_work_dir(folder)
        assert str(caught.value) == f"work dir {folder} cannot be written ({reason}): give another --work-dir"


@pytest.fixture
def nobody():
    """Run as another user than root, for whom all folders are writable."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield
    if was_root:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="rights of files are those of Unix")
def test_a_read_only_folder(nobody):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run").mkdir(mode=0o555)
        for work_dir in (Path(folder) / "run", Path(folder) / "run" / "deeper"):
            with pytest.raises(WorkDirError, match="cannot be written .Permission denied"):
                open_work_dir(work_dir)
        with open_work_dir(Path(folder) / "other"):
            pass


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("data.shared.fcntl.flock", unknown)
    with open_work_dir(tmp_path):
        assert (tmp_path / "run.lock").exists()
