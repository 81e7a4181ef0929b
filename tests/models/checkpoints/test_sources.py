"""Addresses: downloads, checksums, names that stand for URLs. Requests go only to a local test server."""

import hashlib
import os
import shutil
import socket
import ssl
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from models.checkpoints import sources as checkpoint_sources
from models.checkpoints.sources import _cache_entry, local_path
from models.weights import CheckpointError, load_backbone_weights, load_weights


class Quiet(SimpleHTTPRequestHandler):
    """Serves files; /away/ADDRESS leads to that address, /cut/NAME ends in the middle, NAME?id=X is by_query/X."""

    def do_GET(self):
        if "?id=" in self.path:
            self.path = f"/by_query/{self.path.partition('=')[2]}"
        if self.path.startswith("/away/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/away/"))
            self.end_headers()
        elif self.path.startswith("/cut/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(bytes(500))
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for torch hub."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """A folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def nowhere():
    """An address without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def publish(folder, name, content):
    """Saves `content` as `name`, in which {} is replaced by the start of its SHA-256."""
    path = folder / "new.pth"
    torch.save(content, path)
    target = folder / name.format(hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(path, target))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_download_with_checksum(cache, server, capfd):
    folder, address = server
    source = torch.nn.Linear(300, 200)
    path = publish(folder, "linear-{}.pth", source.state_dict())
    model = torch.nn.Linear(300, 200)
    report = load_weights(model, f"{address}/{path.name}")
    assert torch.equal(model.weight, source.weight)
    assert report.source == f"{address}/{path.name}"
    assert "100%" in capfd.readouterr().err  # the progress bar
    assert files(cache) == [path.name]

    path.unlink()  # the second time it comes from the cache
    load_weights(torch.nn.Linear(300, 200), f"{address}/{path.name}")


def test_wrong_checksum_leaves_nothing_behind(cache, server):
    folder, address = server
    publish(folder, "linear-0123abcd.pth", torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(CheckpointError, match="does not have the checksum in its name.*0123abcd") as caught:
        load_weights(torch.nn.Linear(2, 2), f"{address}/linear-0123abcd.pth")
    assert "\n" not in str(caught.value)
    assert files(cache) == []


def assert_each_has_its_own(server, addresses):
    """Publish other weights under each file name, and load each from its address."""
    folder, address = server
    sources = {name: torch.nn.Linear(2, 2) for name in addresses}
    for name, source in sources.items():
        publish(folder, name, source.state_dict())
    for name, source in sources.items():
        model = torch.nn.Linear(2, 2)
        load_weights(model, f"{address}/{addresses[name]}")
        assert torch.equal(model.weight, source.weight)


def test_same_name_from_two_folders(cache, server):
    address = server[1]
    assert_each_has_its_own(server, {name: name for name in ("MSRA/R-50.pkl", "torchvision/R-50.pkl")})
    host = address.removeprefix("http://").replace(":", "_")
    assert files(cache) == [f"{host}/MSRA/R-50.pkl", f"{host}/torchvision/R-50.pkl"]


def test_the_query_chooses_the_file(cache, server):
    """As download?id=... of many servers; the server here serves by the query."""
    assert_each_has_its_own(server, {f"by_query/{name}": f"teacher.pth?id={name}" for name in ("AAA", "BBB")})
    assert len(files(cache)) == 2


def test_all_of_the_path_chooses_the_file(cache, server):
    """Also what comes after a semicolon, and an escaped slash in a name."""
    names = {"teacher.pth;v=1": "teacher.pth;v=1", "teacher.pth;v=2": "teacher.pth;v=2", "a/b.pth": "a/b.pth"}
    assert_each_has_its_own(server, names)
    assert len({_cache_entry(f"https://host/{path}")[0] for path in ("a/b.pth", "a%2Fb.pth", "a%252Fb.pth")}) == 3


def test_a_cached_file_that_was_cut_off_is_downloaded_again(cache, server):
    folder, address = server
    source = torch.nn.Linear(30, 20)
    path = publish(folder, "linear-{}.pth", source.state_dict())
    cached = Path(local_path(f"{address}/{path.name}"))
    cached.write_bytes(cached.read_bytes()[:-100])
    model = torch.nn.Linear(30, 20)
    load_weights(model, f"{address}/{path.name}")
    assert torch.equal(model.weight, source.weight)


@pytest.fixture
def tls_server(server, monkeypatch):
    """The same folder over https, with a certificate that this process trusts."""
    folder, _ = server
    certificate = Path(__file__).with_name("localhost.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield folder, f"https://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def test_https(cache, tls_server, monkeypatch):
    """A download, one that is redirected, one that is cut off, one with a wrong checksum, and a redirection to http."""
    folder, address = tls_server
    source = torch.nn.Linear(2, 2)
    publish(folder, "w.pth", source.state_dict())
    for way in ("w.pth", f"away/{address}/w.pth"):
        model = torch.nn.Linear(2, 2)
        load_weights(model, f"{address}/{way}")
        assert torch.equal(model.weight, source.weight)
    for way, message in (("cut/x.pth", "the connection ended after 500 of 1000 bytes"),
                         ("w-01234567.pth", "File not found"),
                         ("away/http://weights.invalid/w.pth", "is refused: .* use https")):
        with pytest.raises(CheckpointError, match=message):
            local_path(f"{address}/{way}")
    publish(folder, "w-01234567.pth", source.state_dict())
    with pytest.raises(CheckpointError, match="does not have the checksum in its name"):
        local_path(f"{address}/w-01234567.pth")
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CheckpointError, match="certificate"):
        local_path(f"{address}/other.pth")


def test_date_is_no_checksum(cache, server):
    folder, address = server
    publish(folder, "linear-20200130.pth", torch.nn.Linear(2, 2).state_dict())
    load_weights(torch.nn.Linear(2, 2), f"{address}/linear-20200130.pth")


def test_address_cannot_leave_the_cache(cache, server):
    folder, address = server
    publish(folder, "w.pth", torch.nn.Linear(2, 2).state_dict())
    path = local_path(f"{address}/%2e%2e/../%2e%2e/w.pth")
    assert Path(path).resolve().is_relative_to(cache.resolve())


@pytest.mark.parametrize("url", [
    "http://weights.invalid/w-01234567.pth", "http://127.0.0.1.weights.invalid/w.pth",
    "http://localhost@weights.invalid/w.pth"])
def test_plain_http_is_refused(cache, url):
    with pytest.raises(CheckpointError, match="is refused: .* use https") as caught:
        load_weights(torch.nn.Linear(2, 2), url)
    assert "\n" not in str(caught.value) and files(cache) == []


def test_a_redirection_to_plain_http_is_not_followed(cache, server):
    folder, address = server
    path = publish(folder, "w-{}.pth", torch.nn.Linear(2, 2).state_dict())
    load_weights(torch.nn.Linear(2, 2), f"{address}/away/{address}/{path.name}")
    for place in ("http://weights.invalid/v.pth", "ftp://weights.invalid/v.pth"):
        with pytest.raises(CheckpointError, match=f"{place} is refused"):
            load_weights(torch.nn.Linear(2, 2), f"{address}/away/{place}")
    assert files(cache) == [path.name]


def test_a_download_that_ends_early_leaves_nothing_behind(cache, server):
    with pytest.raises(CheckpointError, match="the connection ended after 500 of 1000 bytes"):
        load_weights(torch.nn.Linear(2, 2), f"{server[1]}/cut/w.pth")
    assert files(cache) == []


def test_missing_page(cache, server):
    with pytest.raises(CheckpointError, match="cannot download http.*/none.pth: .*[Nn]ot [Ff]ound"):
        load_weights(torch.nn.Linear(2, 2), f"{server[1]}/none.pth")
    assert files(cache) == []


def test_offline(cache, nowhere):
    with pytest.raises(CheckpointError, match="cannot download .* without network, put the file at") as caught:
        load_weights(torch.nn.Linear(2, 2), f"{nowhere}/w-01234567.pth")
    assert "\n" not in str(caught.value) and str(cache / "w-01234567.pth") in str(caught.value)


def test_unreadable_download_says_what_to_delete(cache, server):
    folder, address = server
    (folder / "page.pth").write_text("<html>sign in</html>")
    with pytest.raises(CheckpointError, match=f"downloaded from {address}/page.pth: delete the file"):
        load_weights(torch.nn.Linear(2, 2), f"{address}/page.pth")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The URLs that a name stands for; nothing is downloaded."""
    urls = []
    monkeypatch.setattr(checkpoint_sources, "_download", lambda url: urls.append(url) or os.devnull)
    return urls


@pytest.mark.parametrize(
    "name, url",
    [
        ("torchvision://resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
        ("torchvision://resnet50", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),  # version 1
        ("torchvision://resnet50/IMAGENET1K_V2", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"),
        ("torchvision://resnet50/DEFAULT", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"),
        ("torchvision://resnext101_64x4d", "https://download.pytorch.org/models/resnext101_64x4d-173b62eb.pth"),
        ("torchvision://swin_t", "https://download.pytorch.org/models/swin_t-704ceda3.pth"),
        ("torchvision://mobilenet_v3_large", "https://download.pytorch.org/models/mobilenet_v3_large-8738ca79.pth"),
        ("torchvision://vit_h_14", "https://download.pytorch.org/models/vit_h_14_swag-80465313.pth"),  # has no V1
        (
            "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
            "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl",
        ),
        (
            "open-mmlab://detectron2/resnet50_caffe",
            "https://download.openmmlab.com/pretrain/third_party/resnet50_msra-5891d200.pth",
        ),
        (
            "open-mmlab://detectron2/resnet101_caffe",
            "https://download.openmmlab.com/pretrain/third_party/resnet101_msra-6cc46731.pth",
        ),
        (
            "open-mmlab://detectron/resnet50_caffe",
            "https://download.openmmlab.com/pretrain/third_party/resnet50_caffe-788b5fa3.pth",
        ),
        (
            "open-mmlab://resnext101_64x4d",
            "https://download.openmmlab.com/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth",
        ),
    ],
)
def test_names(asked, name, url):
    local_path(name)
    assert asked == [url]


def test_plain_name_of_a_backbone(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="downloaded from torchvision://resnet18"):
        load_backbone_weights(torch.nn.Linear(2, 2), "resnet18")  # the pretended download is empty
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    source = torch.nn.Linear(2, 2)
    torch.save(source.state_dict(), "resnet18")  # a file with that name has priority
    assert load_backbone_weights(torch.nn.Linear(2, 2), "resnet18").matched == 2


@pytest.mark.parametrize(
    "name, message",
    [
        ("torchvision://resnet51", "torchvision has no classification model 'resnet51'; known: resnet"),
        ("torchvision://retinanet_resnet50_fpn_v2", "torchvision has no classification model 'retinanet_res"),
        (
            "torchvision://swin_t/IMAGENET1K_V2",
            "torchvision has no weights 'IMAGENET1K_V2' of swin_t; known: IMAGENET1K_V1, DEFAULT",
        ),
        ("open-mmlab://vgg16_caffe", "unknown checkpoint open-mmlab://vgg16_caffe: known are .*resnet50_caffe"),
        ("s3://bucket/w.pth", "unknown kind of checkpoint address: s3://bucket/w.pth"),
        ("http://127.0.0.1", "no file name in"),
        ("https://[::1/w.pth", r"https://\[::1/w.pth is not an address: Invalid IPv6 URL"),
        ("HTTPS://127.0.0.1", "no file name in"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(torch.nn.Linear(2, 2), name)


def test_imagenet_weights_offline(cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(checkpoint_sources, "_fetch", refuse)
    with pytest.raises(
        CheckpointError, match="cannot download https://download.pytorch.org/models/resnet18-f37072fd.pth"
    ):
        load_backbone_weights(torch.nn.Linear(2, 2), "torchvision://resnet18")
