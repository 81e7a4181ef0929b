"""The page about runs, made of folders that are written by hand."""
import hashlib
import json

import pytest
from html_pages import Page, assert_in_order
from run_folders import TEACHER, run_config, write_run

from data import DataError
from kd.experiments.compare import compare
from kd.experiments.report.charts import axis, number
from kd.experiments.report.html import Html, breakable, join, tag
from kd.experiments.report.page import write_report
from kd.experiments.tables import cells_of
from kd.work_dir.records import read_runs

ALONE, DISTILLED = (0.30, 0.31, 0.32), (0.36, 0.372, 0.378)  # gains of 6.0, 6.2 and 5.8 points
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
ORIGIN = {"command": ["/somewhere/scripts/train.py", "--cfg", "a b.yaml"], "commit": "0123456789abcdef+",
          "date": "2026-11-28T10:00:00+00:00", "versions": {"torch": "2.14"},
          "machine": {"system": "Linux", "device": "cpu", "threads": 2}}


def study(folder, seconds=(100.0, 170.0)):
    """A teacher, and over three seeds the student alone, for twice the epochs, and with CrossKD."""
    write_run(folder / "teacher", [0.1, 0.2, 0.5], run_config(epochs=3), checkpoint=TEACHER)
    path, digest = folder / "teacher" / "last.pth", hashlib.sha256(TEACHER).hexdigest()
    for seed, (before, after) in enumerate(zip(ALONE, DISTILLED)):
        write_run(folder / f"alone_seed{seed}", [0.1, before], run_config(seed), seconds=seconds[0], **ORIGIN)
        write_run(folder / f"long_seed{seed}", [0.1, 0.2, 0.3, before + 0.055], run_config(seed, epochs=4),
                  seconds=2 * seconds[0])
        write_run(folder / f"crosskd_seed{seed}", [0.2, after], run_config(seed, methods=("CrossKD",), teacher=path),
                  {str(path): digest}, seconds=seconds[1], peak=2 ** 30)
    return sorted(folder.iterdir())


def report(paths, out, **options):
    """The page about runs, and the notes."""
    notes = write_report(read_runs(paths)[0], out / "report.html", "python scripts/report.py", **options)
    page = Page(out / "report.html")
    assert_in_order(page)
    return page, notes


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(paths, tmp_path_factory):
    return report(paths, tmp_path_factory.mktemp("page"))[0]


def test_the_verdict_stands_first(page):
    assert [own["id"] for own in page.all("section") if "id" in own][0] == "answer"
    said = page.text("answer")
    assert "After the same number of epochs, crosskd pays: +6.0 ± 0.5 points of AP over alone." in said
    assert "After the same time, crosskd pays: +0.5 ± 0.5 points of AP over long" in said
    assert "equal epochs ✓ pays +6.0 ± 0.5" in said and "equal time ✓ pays +0.5 ± 0.5" in said
    assert "over long, which took 1.18 times as long" in said
    assert "CrossKD, 2 epochs, seeds 0, 1, 2" in said and "Closes 32% of the gap to the teacher." in said
    label, = [own["aria-label"] for own in page.all("svg") if "at equal time" in own.get("aria-label", "")]
    assert label == "Gain of crosskd at equal epochs +6.0 ± 0.5 points of AP, at equal time +0.5 ± 0.5"


def test_figures_and_costs_are_those_of_compare(paths, page):
    header, cells = cells_of(compare(read_runs(paths)[0]))
    for row in cells:
        own = dict(zip(header, row))
        for section, names in (("figures", ("AP", "AP50", "APl", "gain", "gap closed")),
                               ("costs", ("hours", "cost", "peak GiB", "training images/s"))):
            assert all(own[name] in page.text(section) for name in names)
    assert "95% confidence interval (Student's t)" in page.text("figures")
    assert "peak memory, which" not in page.text("costs")
    assert "AP over hours" in page.text("costs") and "crosskd: 37.0 points after 0.0472 hours" in page.text("costs")
    assert "the operations of a step of 1 setting" in page.text("costs")


def test_curves_have_bands(page):
    said = page.text("curves")
    assert "AP of crosskd over epochs epoch 2: alone 31, crosskd 37, the teacher 50" in said
    assert said.count("over epochs") == 1 + 3  # the heading; crosskd with alone, long, teacher
    assert len(page.all("path", class_="band")) == 3  # crosskd, alone and long; the teacher has one seed


def test_gains_by_class_and_size(page):
    said = page.text("gains")
    assert "run small objects medium objects large objects disc ring" in said
    assert "crosskd - +6.0 ± 0.5 +6.0 ± 0.5 +6.0 ± 0.5 -" in said
    assert "AP without a teacher, points" in said and "alone - 31.0 ± 1.0" in said


def test_what_is_left_out_is_said(page):
    for section, what in (("errors", "errors by kind"), ("precision", "None of the runs holds a precision_recall.json"),
                          ("pictures", "They need the checkpoints")):
        assert "Left out:" in page.text(section) and what in page.text(section)
        assert "The same command with --analyze computes them" in page.text(section)


def test_commands_and_commits(page):
    said = page.text("origin")
    assert said.count("python scripts/train.py --cfg 'a b.yaml'") == 1  # the same for all seeds
    assert "0123456789abcdef, with changes that were not committed" in said and "Linux, cpu, 2 threads" in said
    assert "command not known" in said and "SHA-256 " + hashlib.sha256(TEACHER).hexdigest()[:16] in said
    assert "10 runs of 4 settings" in page.text() and "python scripts/report.py" in page.text()


def test_one_run(tmp_path):
    path = write_run(tmp_path / "only", [0.1, 0.25], run_config())
    page, notes = report([path], tmp_path)
    assert "Nothing is distilled here, so there is no verdict. only has an AP of 25.0." in page.text("answer")
    assert not notes and page.text().startswith("A trained detector A trained detector runs 1 run of 1 setting")
    assert "AP, points" in page.text("gains") and "epoch 2: only 25" in page.text("curves")
    assert "without a teacher" in page.text("curves") and "distilled" not in page.text("curves")


def test_one_distilled_run(tmp_path):
    path = write_run(tmp_path / "only", [0.25], run_config(methods=("CrossKD",), teacher="gone.pth"))
    page, _ = report([path], tmp_path)
    assert "Nobody can tell whether only (1 of 2 epochs) pays: training has not ended." in page.text("answer")
    assert "curves. Each run was evaluated once" in page.text("curves")
    page, _ = report([write_run(tmp_path / "done", [0.2, 0.3], run_config(methods=("FGD",), teacher="gone.pth"))],
                     tmp_path)
    assert "pays: no run of the student alone with the same settings and seed." in page.text("answer")


def test_several_settings_are_counted(tmp_path):
    for seed, before in enumerate(ALONE):
        write_run(tmp_path / f"alone_seed{seed}", [0.1, before], run_config(seed))
        for name, after in (("FGD", before + 0.1 + seed / 1000), ("PKD", before - 0.05 - seed / 1000),
                            ("LD", before + (0.1, -0.1, 0)[seed])):
            write_run(tmp_path / f"{name}_seed{seed}", [0.1, after], run_config(seed, methods=(name,), teacher="t.pth"))
    page, _ = report(sorted(tmp_path.iterdir()), tmp_path)
    said = page.text("answer")
    assert ("After the same number of epochs, 1 of 3 distilled settings pays, 1 does not; for 1 nobody can tell."
            in said)
    assert "✗ does not pay -5.1 ± 0.2" in said and "? cannot tell" in said and "✓ pays +10.1 ± 0.2" in said
    assert "The highest AP of a distilled setting is that of FGD : 41.1 ± 1.1" in said and "may be luck" in said


def test_metrics_alone_and_evaluations_without_ap(tmp_path):
    folder = write_run(tmp_path / "some", [0.1, 0.2], None)
    (folder / "metrics.jsonl").rename(tmp_path / "some.jsonl")
    page, _ = report([tmp_path / "some.jsonl"], tmp_path)
    assert "some has an AP of 20.0" in page.text("answer") and "command not known" in page.text("origin")
    page, _ = report([write_run(tmp_path / "none", [None, None], run_config())], tmp_path)
    assert "No AP is known." in page.text("answer") and "no AP is known" in page.text("curves")


def test_no_run_has_been_evaluated(tmp_path):
    with pytest.raises(DataError, match="no run among .*empty has been evaluated yet: there is nothing to report"):
        report([write_run(tmp_path / "empty", [], run_config())], tmp_path)
    assert not (tmp_path / "report.html").exists()


def curves(ap):
    line = [ap] * 101
    return {"recall": [i / 100 for i in range(101)], "precision": {"disc": {"0.50": line, "0.75": [0.0] * 101},
                                                                   "ring": {"0.50": [0.55] * 101, "0.75": None}}}


def analysis(ap):
    return [{"name": "last", "classes": ["disc", "ring"], "AP": [ap, None], "AP50": [ap, None],
             "lost": {kind: [0.01 * (i + 1) + (0.5 - ap) / 10, None] for i, kind in enumerate(KINDS)}}]


@pytest.fixture
def richer(tmp_path):
    """The study with what eval.py and analyze.py leave in work dirs."""
    paths = study(tmp_path / "richer")
    for path in paths:
        for seed, (before, after) in enumerate(zip(ALONE, DISTILLED)):
            for name, ap in ((f"alone_seed{seed}", before), (f"crosskd_seed{seed}", after)):
                if path.name == name:
                    (path / "precision_recall.json").write_text(json.dumps(curves(ap)))
                    (path / "analysis.json").write_text(json.dumps(analysis(ap)))
    return paths


def test_precision_over_recall(richer, tmp_path):
    page, _ = report(richer, tmp_path)
    said = page.text("precision")
    assert ("Mean precision: alone at IoU 0.50 0.43, alone at IoU 0.75 0.00, crosskd at IoU 0.50 0.46, crosskd at IoU "
            "0.75 0.00") in said
    assert "By class: crosskd" in said and "Precision over recall: disc Mean precision: alone at IoU 0.50 0.31" in said


def test_errors_that_analyze_left_in_work_dirs(richer, tmp_path):
    page, notes = report(richer, tmp_path)
    said = page.text("errors")
    assert not notes and "run AP50 classification localisation both duplicate background missed" in said
    assert "alone 31.0 ± 1.0 2.9 ± 0.1" in said and "crosskd 37.0 ± 0.9 2.3 ± 0.1" in said
    assert "classification 2.9 → 2.3" in said
    labels = [own.get("aria-label") for own in page.all("svg")]
    assert "missed: 7.9 points for alone, 7.3 for crosskd" in labels


@pytest.mark.parametrize("content, part", [
    (json.dumps(analysis(0.9)), "is not of the run's last evaluation: analyze.py --out writes it again."),
    (json.dumps(analysis(0.3) * 2), "is not the analysis of one detector"), ("{}", "it must hold a list, not {}"),
    ("[{}]", "is not the analysis of one detector"), ("[1]", "is not the analysis of one detector"), ("[", "cannot"),
    (json.dumps(analysis(0.3)).replace("0.03", '"much"'), "is not the analysis of one detector")])
def test_an_analysis_that_does_not_fit_is_named(richer, tmp_path, content, part):
    file = next(path for path in richer if path.name == "alone_seed0") / "analysis.json"
    file.write_text(content)
    page, notes = report(richer, tmp_path)
    assert len(notes) == 1 and str(file) in notes[0] and part in notes[0]
    assert part.rstrip(".") in page.text()


def test_names_from_files_are_no_markup(tmp_path):
    evil, other = "<img src=x onerror=alert(1)>", "</style><script>alert(2)</script>"
    cfg = run_config()
    cfg["data"]["val"]["annotations"] = other
    folder = write_run(tmp_path / f"{evil}&amp;'\"$title", [0.1, 0.2], cfg,
                       {other: "0" * 64}, commit=other, command=[other, evil], date=other, machine={"system": other},
                       versions={other: evil})
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"disc"', json.dumps(other)).replace('"ring"', '"a$bc"'))
    page, _ = report([folder], tmp_path, title=f"{evil} $answer")
    assert page.all("script") == [] and page.all("img") == []
    assert other in page.text("gains") and evil in page.text("answer") and f"{evil} $answer" in page.text()
    policy, = [own for own in page.all("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_many_settings_and_classes_stay_small(tmp_path):
    """Sixty settings of 80 classes: under a megabyte, with a dozen charts, and it says what is left out."""
    names = {f"class {i}": 0.3 for i in range(80)}
    for i in range(60):
        methods = ("CrossKD",) if i else ()
        cfg = run_config(methods=methods, teacher="t.pth") if i else run_config()
        if i:
            cfg["distill"]["methods"][0]["weight"] = i / 10
        folder = write_run(tmp_path / f"setting{i:02}_with_quite_a_long_name", [0.1, 0.2 + i / 100], cfg)
        text = (folder / "metrics.jsonl").read_text()
        names["class 7"] = 0.1 + i / 100
        (folder / "metrics.jsonl").write_text(text.replace('{"disc": 0.1, "ring": null}', json.dumps(names)).replace(
            f'{{"disc": {0.2 + i / 100}, "ring": null}}', json.dumps(names)))
    page, _ = report(sorted(tmp_path.iterdir()), tmp_path)
    assert len(page.source) < 1_000_000
    assert "47 panels of further settings" in page.text("curves") and "setting00" in page.text("figures")
    assert "60 classes of 80, those that change least" in page.text("gains") and "class 7 " in page.text("gains")


@pytest.mark.parametrize("values, start, ticks", [
    ([0.2, 0.5], 0, "0 0.1 0.2 0.3 0.4 0.5"), ([41.3, 53.8], None, "40 45 50 55"), ([0], 0, "0 0.2"),
    ([5], None, "5 6"), ([-3, 12], 0, "-5 0 5 10 15"), ([1e-4, 3e-4], 0, "0 0.0001 0.0002 0.0003"),
    ([15], 0, "0 5 10 15"), ([-2, -1], 0, "-2 -1.5 -1 -0.5 0")])
def test_round_ticks(values, start, ticks):
    found = axis("", values, start)
    assert " ".join(map(number, found.ticks)) == ticks
    assert found.low <= min(values) and found.high >= max(values) and found.high > found.low


def test_html_escapes_what_is_text():
    assert tag("p", "a < b", tag("b", "&"), class_="x\"y", aria_label=None) == (
        '<p class="x&quot;y">a &lt; b<b>&amp;</b></p>')
    assert join("<", None, Html("<i></i>")) == "&lt;<i></i>" and breakable("a_<b>/c_") == "a_<wbr>&lt;b&gt;/<wbr>c_"
