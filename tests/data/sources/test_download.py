"""Downloads from a local server that breaks connections, and archives of every kind."""
import hashlib
import io
import json
import re
import stat
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from runs import run_script

import data.sources.download
from data.sources.download import Archive, DownloadError, checksum, download, prepare_coco, unpack

CONTENT = bytes(range(256)) * 800


class Handler(BaseHTTPRequestHandler):
    """Serves `files`, closes connections after the given `cuts`, and records the requests."""

    files: dict[str, bytes]
    cuts: list[int]
    requests: list[tuple[str, str | None]]
    ranges = True
    status = None

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        content = self.files.get(self.path)
        if content is None or self.status:
            return self.send_error(self.status or 404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.cuts.pop(0) if self.cuts else None
        self.wfile.write(content[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server and its address; there is no pause between attempts."""
    monkeypatch.setattr(data.sources.download, "PAUSE", 0)
    handler = type("Own", (Handler,), {"files": {"/a.zip": CONTENT}, "cuts": [], "requests": []})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield handler, f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def fetch(server, tmp_path, content=CONTENT, name="a.zip"):
    download(f"{server[1]}/{name}", tmp_path / name, len(content), sha256(content))
    assert (tmp_path / name).read_bytes() == content and not (tmp_path / f"{name}.partial").exists()


def test_a_whole_file(server, tmp_path):
    fetch(server, tmp_path)
    assert server[0].requests == [("/a.zip", None)]


def test_a_connection_that_ends_is_taken_up_where_it_ended(server, tmp_path):
    server[0].cuts = [1000, 0, 70000]
    fetch(server, tmp_path)
    assert [wanted for _, wanted in server[0].requests] == [None, "bytes=1000-", "bytes=1000-", "bytes=71000-"]


def test_another_call_goes_on_where_the_first_was_cut_off(server, tmp_path):
    server[0].cuts = [50000] + [0] * data.sources.download.ATTEMPTS
    with pytest.raises(DownloadError, match="after 50000 of 204800 bytes; the same command goes on"):
        fetch(server, tmp_path)
    assert (tmp_path / "a.zip.partial").read_bytes() == CONTENT[:50000] and not (tmp_path / "a.zip").exists()
    server[0].requests.clear()
    fetch(server, tmp_path)
    assert server[0].requests == [("/a.zip", "bytes=50000-")]


def test_a_server_that_cannot_send_parts_begins_anew(server, tmp_path):
    server[0].ranges, server[0].cuts = False, [3000]
    fetch(server, tmp_path)
    assert [wanted for _, wanted in server[0].requests] == [None, "bytes=3000-"]


def test_other_content_is_thrown_away(server, tmp_path):
    (tmp_path / "a.zip.partial").write_bytes(b"x" * 1000)  # of another file
    with pytest.raises(DownloadError, match=f"should have {sha256(CONTENT)}: it was thrown away"):
        fetch(server, tmp_path)
    assert not list(tmp_path.iterdir())
    fetch(server, tmp_path)
    (tmp_path / "b.zip.partial").write_bytes(b"x" * (len(CONTENT) + 1))
    with pytest.raises(DownloadError, match="size or SHA-256 204801, and should have 204800"):
        fetch(server, tmp_path, name="b.zip")


@pytest.mark.parametrize("name, status, part", [
    ("nowhere.zip", None, "HTTP Error 404"), ("a.zip", 403, "HTTP Error 403"), ("a.zip", 503, "HTTP Error 503")])
def test_a_server_that_refuses(server, tmp_path, name, status, part):
    server[0].status = status
    with pytest.raises(DownloadError, match=part):
        fetch(server, tmp_path, name=name)
    assert len(server[0].requests) == (data.sources.download.ATTEMPTS if status == 503 else 1)


def test_a_file_of_another_size(server, tmp_path):
    with pytest.raises(DownloadError, match="it has 204800 bytes there, and should have 5"):
        fetch(server, tmp_path, b"12345")


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources.download, "PAUSE", 0)
    with pytest.raises(DownloadError, match="cannot download .*refused"):
        download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip", 5, "")


def test_plain_http_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="is not an https address"):
        download("http://images.cocodataset.org/zips/val2017.zip", tmp_path / "a.zip", 5, "")


def test_no_room(server, tmp_path):
    with pytest.raises(DownloadError, match="needs .* GiB, and .* free: make room"):
        download(f"{server[1]}/a.zip", tmp_path / "a.zip", 1 << 60, "")
    assert not server[0].requests


# --- archives ---

@contextmanager
def changed_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("val2017/1.jpg", b"first")
        yield archive


@pytest.mark.parametrize("name", ["../out.txt", "val2017/../../out.txt", "/etc/out.txt", "C:/out.txt", "..\\out.txt"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    with changed_archive(tmp_path / "a.zip") as archive:
        archive.writestr(name, b"bad")
    with pytest.raises(DownloadError, match="leads out of the folder: nothing of it was unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.zip"]


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("val2017/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with changed_archive(tmp_path / "a.zip") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DownloadError, match="is a link"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unpacking_goes_on_where_it_was_stopped(tmp_path):
    with changed_archive(tmp_path / "a.zip") as archive:
        archive.writestr("val2017/2.jpg", b"second")
        archive.writestr("val2017/3.jpg", b"third")
    folder = tmp_path / "val2017"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"FIRST")  # of its full size
    (folder / "2.jpg").write_bytes(b"sec")
    (folder / "3.jpg.tmp").write_bytes(b"th")
    assert unpack(tmp_path / "a.zip", tmp_path) == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "1.jpg": b"FIRST", "2.jpg": b"second", "3.jpg": b"third"}


@pytest.mark.parametrize("spoil", [lambda b: b[:-30], lambda b: b.replace(b"first", b"thirf"), lambda b: b"no zip"])
def test_damaged_archives(tmp_path, spoil):
    with changed_archive(tmp_path / "a.zip"):
        pass
    (tmp_path / "a.zip").write_bytes(spoil((tmp_path / "a.zip").read_bytes()))
    with pytest.raises(DownloadError, match="is damaged"):
        unpack(tmp_path / "a.zip", tmp_path)
    assert not (tmp_path / "val2017" / "1.jpg").exists()


# --- COCO ---

@pytest.fixture
def small_coco(server, monkeypatch):
    """Archives with COCO's layout, at their addresses on the server."""
    members = {"annotations": {"annotations/instances_val2017.json": json.dumps({"images": []})},
               "val": {"val2017/1.jpg": "one", "val2017/2.jpg": "two" * 9000}, "train": {"train2017/3.jpg": "three"}}
    archives = {}
    for part, known in data.sources.download.COCO_2017.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members[part].items():
                archive.writestr(name, content)
        server[0].files[f"/{known.path}"] = buffer.getvalue()
        archives[part] = Archive(known.path, len(buffer.getvalue()), sha256(buffer.getvalue()))
    monkeypatch.setattr(data.sources.download, "COCO_2017", archives)
    return server


def test_coco_with_an_interruption(small_coco, tmp_path, monkeypatch, capsys):
    handler, address = small_coco
    handler.cuts = [10**9, 5000] + [0] * data.sources.download.ATTEMPTS  # in the middle of the second archive
    arguments = ("prepare_data.py", "coco", "--out", tmp_path, "--server", address)
    assert run_script(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "val2017.zip: the connection ended, after 5000 of" in error[0]
    assert (tmp_path / "annotations" / "instances_val2017.json").is_file() and not (tmp_path / "val2017").exists()
    handler.requests.clear()
    assert run_script(monkeypatch, *arguments) == 0
    assert handler.requests == [("/zips/val2017.zip", "bytes=5000-"), ("/zips/train2017.zip", None)]
    printed = capsys.readouterr().out
    assert "annotations_trainval2017.zip: unpacked before" in printed
    assert "val2017.zip: checked, and 2 files unpacked" in printed
    assert (tmp_path / "val2017" / "2.jpg").read_text() == "two" * 9000
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "annotations", "train2017", "val2017"]
    handler.requests.clear()
    assert run_script(monkeypatch, *arguments) == 0 and not handler.requests


def test_coco_in_parts_and_with_its_archives(small_coco, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEKD_DATA", str(tmp_path))
    assert run_script(monkeypatch, "prepare_data.py", "coco", "--parts", "val", "--server", small_coco[1],
                      "--keep-archives") == 0
    assert {path.name for path in (tmp_path / "coco").iterdir()} == {"val2017", "val2017.zip", ".val2017.zip.unpacked"}
    lines = prepare_coco(tmp_path / "coco", ["val"], small_coco[1])
    assert lines == ["val2017.zip: unpacked before"]


def test_the_real_archives():
    """The files are too large to download in a test, so only the form of their sizes and checksums is tested."""
    archives = data.sources.download.COCO_2017
    assert [archive.name for archive in archives.values()] == ["annotations_trainval2017.zip", "val2017.zip",
                                                              "train2017.zip"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", archive.sha256) and archive.size > 1e8 for archive in archives.values())
    assert data.sources.download.COCO_SERVER.startswith("https://")


def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    assert checksum(tmp_path / "a") == sha256(CONTENT)
