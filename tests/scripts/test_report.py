"""report.py from the command line, with checkpoints and without, and what it refuses."""
import json
import re
import shutil

import pytest
from html_pages import Page, assert_in_order
from report_pages import METHODS, trained
from run_folders import run_config, write_run
from runs import run_script


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copies(paths, tmp_path):
    """Copies that a test may damage."""
    return [shutil.copytree(path, tmp_path / "copies" / path.name) for path in paths]


def report(monkeypatch, capsys, out, *arguments):
    """The page, what was printed, and the lines of errors."""
    code = run_script(monkeypatch, "report.py", *arguments, "--out", out)
    printed, error = capsys.readouterr()
    assert code == 0, error
    page = Page(out)
    assert_in_order(page)
    return page, printed, error.strip().splitlines()


def test_without_checkpoints(copies, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes").mkdir()
    page, printed, error = report(monkeypatch, capsys, tmp_path / "report.html", *copies, tmp_path / "notes")
    assert printed == f"wrote {tmp_path / 'report.html'}\n"
    assert error == [f"{tmp_path / 'notes'} is left out: there is no metrics.jsonl in it"]
    assert "Left out: errors by kind" in page.text("errors") and "--analyze" in page.text("pictures")
    assert f"scripts/report.py {copies[0]}" in page.text()


def test_with_checkpoints(paths, tmp_path, monkeypatch, capsys):
    page, _, error = report(monkeypatch, capsys, tmp_path / "report.html", *paths, "--analyze", "--pictures", 3,
                            "--score-thr", 0.9, "--device", "cpu", "--title", "Shapes & sizes")
    assert len([line for line in error if " in the last line of the records" in line]) == 6
    assert not [line for line in error if line.startswith("The teacher of ")]
    assert page.text().startswith("Shapes & sizes Shapes & sizes runs 6 runs of 3 settings")
    assert "the teacher" in page.text("curves")  # its AP is not in the records
    said = page.text("errors")
    assert "the teacher" in said and "classification" in said and said.count("→") == 6 * len(METHODS)
    assert "By class: Mimic" in page.text("precision") and "disc" in page.text("precision")
    said = page.text("pictures")
    assert "Mimic makes fewer mistakes than alone on" in said and "scores of 0.9 or more" in said
    shown = [own["href"] for own in page.all("image")]
    assert 1 <= len(shown) <= 3 and all(href.startswith("data:image/jpeg;base64,") for href in shown)
    assert len(page.all("use")) == 3 * len(shown)  # the teacher, alone and distilled
    truth = json.loads((paths[0].parents[1] / "scenes" / "annotations" / "val.json").read_text())
    objects = {image["file_name"]: sum(a["image_id"] == image["id"] for a in truth["annotations"])
               for image in truth["images"]}
    names = [name for name in objects if f"{name} " in said]
    assert len(names) == len(shown)
    for name in names:
        assert re.search(rf"{name} [^/]*? annotated {objects[name]} objects? ", said), (name, objects[name], said)
    assert len(page.source) < 300_000


def test_one_run_with_its_checkpoint(paths, tmp_path, monkeypatch, capsys):
    page, *_ = report(monkeypatch, capsys, tmp_path / "report.html", paths[0], "--analyze", "--device", "cpu")
    assert "Below: the images with the most of them." in page.text("pictures") and len(page.all("image")) == 4
    assert "run AP50 classification" in page.text("errors") and "→" not in page.text("errors")


def test_a_checkpoint_that_is_missing_or_broken_is_named(copies, tmp_path, monkeypatch, capsys):
    (copies[0] / "last.pth").unlink()
    (copies[1] / "last.pth").write_bytes(b"broken")
    page, _, error = report(monkeypatch, capsys, tmp_path / "report.html", *copies[:4], "--analyze", "--device", "cpu")
    assert "alone_seed0 has no checkpoint." in error and "alone_seed0 has no checkpoint." in page.text()
    assert [line for line in error if line.startswith("CrossKD_seed0: cannot read checkpoint ") and "last.pth" in line]
    assert "Left out: what follows." in page.text()


def refused(monkeypatch, capsys, *arguments):
    assert run_script(monkeypatch, "report.py", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]


def test_what_is_refused(paths, tmp_path, monkeypatch, capsys):
    page = tmp_path / "report.html"
    nowhere, empty = tmp_path / "nowhere", write_run(tmp_path / "empty", [], run_config())
    (tmp_path / "folder").mkdir()
    for arguments, part in [
            ([nowhere, "--out", page], f"no run among {nowhere}: give work dirs of train.py"),
            ([tmp_path / "folder", "--out", page], f"no run among {tmp_path / 'folder'}: give work dirs of train.py"),
            ([paths[0], "--out", tmp_path / "report.pdf"], "report.pdf: the page is HTML, so give a file that"),
            ([paths[0], "--out", paths[0] / "run.json" / "report.html"], "report.html cannot be written (Not a dir"),
            ([paths[0]], "the following arguments are required: --out"),
            ([paths[0], "--out", page, "--pictures", 2], "--pictures is for the evaluation of checkpoints: add --ana"),
            ([paths[0], "--out", page, "--score-thr", 0.5], "--score-thr is for the evaluation"),
            ([paths[0], "--out", page, "--device", "cpu"], "--device is for the evaluation")]:
        assert part in refused(monkeypatch, capsys, *arguments)
    assert run_script(monkeypatch, "report.py", empty, "--out", page) == 2
    assert "has been evaluated yet" in capsys.readouterr().err and not page.exists()
    (tmp_path / "folder.html").mkdir()
    assert "cannot be written" in refused(monkeypatch, capsys, paths[0], "--out", tmp_path / "folder.html")


def test_analyze_needs_a_checkpoint(copies, tmp_path, monkeypatch, capsys):
    for path in copies:
        (path / "last.pth").unlink()
    said = refused(monkeypatch, capsys, *copies, "--analyze", "--device", "cpu", "--out", tmp_path / "report.html")
    assert said.startswith("error: --analyze: none of the runs has a last.pth or best.pth: give work dirs that still")
