"""The first part of the page: whether distillation pays, in words, and how sure that is."""
from collections.abc import Sequence

from data.errors import counted

from ..compare import Row
from ..tables import gap_text, next_epochs, with_deviation
from ..verdict import CANNOT_TELL, CONFIDENCE, DOES_NOT_PAY, PAYS, Judgement
from .charts import Axis, Mark, axis, ruler, strip
from .html import Html, breakable, join, tag

SIGNS = {PAYS: ("✓", "pays"), DOES_NOT_PAY: ("✗", "not"), CANNOT_TELL: ("?", "unknown")}  # and classes of style.css


def distilled_first(rows: Sequence[Row]) -> list[Row]:
    """The distilled settings, those with a gain first, and of these the highest AP first."""
    distilled = [row for row in rows if row.verdict]
    return sorted(distilled, key=lambda row: (row.gain is None, -(row.figures["AP"][0] or 0)))


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Settings without a verdict, the highest AP first."""
    return sorted((row for row in rows if not row.verdict), key=lambda row: -(row.figures["AP"][0] or 0))


def answer(rows: Sequence[Row]) -> Html:
    """The verdict in a sentence or two, and then setting by setting."""
    distilled = distilled_first(rows)
    if not distilled:
        return join(tag("p", nothing_distilled(rows), class_="lead"), ap_list(best_first(rows)))
    parts = [tag("p", tag("strong", headline(distilled)), class_="lead")]
    if any(row.gain is not None for row in distilled):
        parts.append(tag("p", tag("strong", time_headline(distilled)), " An epoch with a teacher takes longer than one "
                         "without, so the comparison at equal time is the fairer one.", class_="lead"))
    if len(distilled) > 1 and distilled[0].gain is not None:
        best = distilled[0]
        parts.append(tag("p", "The highest AP of a distilled setting is that of ", tag("strong", breakable(best.name)),
                         f": {with_deviation(*best.figures['AP'])}, a gain of {gain_text(best.verdict)}. It is the "
                         f"highest of {len(distilled)} on the very images that these figures are from, so a part of it "
                         "may be luck. Choose on other images, and then measure the choice once."))
    return join(*parts, verdict_list(distilled))


def nothing_distilled(rows: Sequence[Row]) -> Html:
    best = best_first(rows)[0]
    ap = with_deviation(*best.figures["AP"])
    if len(rows) == 1:
        return join("Nothing is distilled here, so there is no verdict. ", tag("strong", breakable(best.name)),
                    f" has an AP of {ap}.")
    return join("Nothing is distilled in these runs, so there is no verdict. The highest AP is that of ",
                tag("strong", breakable(best.name)), f": {ap}.")


def headline(distilled: Sequence[Row]) -> Html:
    """The verdicts at equal epochs."""
    if len(distilled) > 1:
        return join(f"After the same number of epochs, {verdicts([row.verdict for row in distilled])}.")
    row, = distilled
    if row.verdict.gain is None:
        return join("Nobody can tell whether ", breakable(row.name), f" pays: {row.verdict.reason}.")
    return join("After the same number of epochs, ", of_one(row, row.verdict))


def time_headline(distilled: Sequence[Row]) -> Html:
    """The verdicts at equal time."""
    judged = [row.equal_time for row in distilled if row.equal_time]
    missing = len(distilled) - len(judged)
    if not judged:
        return join("After the same time, nobody can tell: no student alone was trained for as long, or times cannot "
                    "be compared.")
    if len(distilled) == 1:
        return join("After the same time, ", of_one(distilled[0], judged[0]))
    rest = f" For {missing} there is nothing to compare with." if missing else ""
    return join(f"After the same time, {verdicts(judged)}.{rest}")


def of_one(row: Row, judged: Judgement) -> Html:
    """The verdict on a setting, as the end of a sentence."""
    said = (join("nobody can tell whether ", breakable(row.name), " pays") if judged.verdict == CANNOT_TELL else
            join(breakable(row.name), f" {judged.verdict}"))
    reason = f" ({judged.reason})" if judged.reason else ""
    return join(said, f": {gain_text(judged)} points of AP over ", breakable(judged.baseline), f"{reason}.")


def verdicts(judged: Sequence[Judgement]) -> str:
    """How many settings have each verdict, for example `2 of 5 distilled settings pay, 1 does not; for 2 nobody can
    tell`."""
    pay, do_not, unknown = (sum(one.verdict == kind for one in judged) for kind in (PAYS, DOES_NOT_PAY, CANNOT_TELL))
    said = f"{pay or 'none'} of {counted(len(judged), 'distilled setting')} pay{'s' * (pay < 2)}"
    said += f", {do_not} {'does' if do_not == 1 else 'do'} not" if do_not else ""
    return said + (f"; for {unknown} nobody can tell" if unknown else "")


def gain_text(judged: Judgement) -> str:
    return with_deviation(judged.gain, judged.interval, signed=True)


def marks_of(row: Row) -> list[Mark]:
    """The gain at equal epochs, and at equal time as a hollow dot, in points, with their intervals."""
    marks = []
    for judged, kind in ((row.verdict, "own"), (row.equal_time, "hollow")):
        if judged and judged.gain is not None:
            gain, half = 100 * judged.gain, None if judged.interval is None else 100 * judged.interval
            marks.append(Mark(gain, *((None, None) if half is None else (gain - half, gain + half)), kind))
    return marks


def scale_of(rows: Sequence[Row]) -> Axis:
    """A scale that holds all gains, and intervals up to about twice the largest gain: that of two seeds can be huge."""
    marks = [mark for row in rows for mark in marks_of(row)]
    most = 2 * max((abs(mark.value) for mark in marks), default=1) + 1
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None]
    return axis("gain", [min(most, max(-most, end)) for end in ends] or [1], 0)


def verdict_list(distilled: Sequence[Row]) -> Html:
    """Each distilled setting with its verdicts, and its gains as dots on a common scale."""
    scale, items = scale_of(distilled), []
    for row in distilled:
        marks = marks_of(row)
        drawn = strip(marks, scale, description(row)) if marks else None
        said = [verdict_line("equal epochs", row.verdict), time_line(row)]
        if row.gap_closed is not None:
            said.append(tag("p", f"Closes {gap_text(row.gap_closed)} of the gap to the teacher.", class_="about"))
        items.append(tag("li", who(row, row.methods.replace("+", " + ") or "no methods"),
                         tag("div", *said, class_="said"), tag("div", drawn, class_="drawn")))
    if any(row.gain is not None for row in distilled):
        key = tag("p", "Dots: gain in points of AP, ● at equal epochs, ○ at equal time. Lines: "
                  f"{100 * CONFIDENCE:.0f}% confidence interval, cut off where it is very wide. Left of the vertical "
                  "line, at 0, is a loss.", class_="about")
        items.append(tag("li", key, tag("div", ruler(scale, signed=True), class_="drawn"), class_="key"))
    return tag("ol", *items, class_="verdicts")


def who(row: Row, *about: str) -> Html:
    """A setting's name, and in small letters what it is."""
    seeds = f"seed{'s' * (len(row.runs) > 1)} {', '.join(str(run.seed) for run in row.runs)}"
    about = ", ".join([*about, counted(row.runs[0].done, "epoch"), seeds])
    return tag("div", tag("strong", breakable(row.name)), tag("span", about, class_="about"), class_="who")


def verdict_line(when: str, judged: Judgement, over: str = "") -> Html:
    """A verdict as a coloured word with a sign, and the gain."""
    sign, class_ = SIGNS[judged.verdict]
    reason = [text for text in (judged.reason, over) if text]
    gain = gain_text(judged) if judged.gain is not None else ""
    return tag("p", tag("span", when, class_="when"), " ",
               tag("span", f"{sign} {judged.verdict}", class_=f"badge {class_}"), " ", tag("span", gain, class_="gain"),
               tag("span", f" ({', '.join(reason)})", class_="about") if reason else None)


def time_line(row: Row) -> Html | None:
    """The same at equal time, or why there is no verdict."""
    if row.equal_time:
        return verdict_line("equal time", row.equal_time,
                            f"over {row.equal_time.baseline}, which took {row.longer:.2f} times as long")
    if row.gain is None:
        return None
    why = ("a time is not recorded, or the machines differ" if row.epochs_to_equal is None else
           f"train the student alone for {next_epochs(row)} epochs or a little more")
    return verdict_line("equal time", Judgement(CANNOT_TELL, why))


def description(row: Row) -> str:
    """The chart of a setting in words."""
    text = f"Gain of {row.name} at equal epochs {gain_text(row.verdict)} points of AP"
    return text + (f", at equal time {gain_text(row.equal_time)}" if row.equal_time else "")


def ap_list(rows: Sequence[Row]) -> Html:
    """AP of settings that have no verdict, with the range over the seeds."""
    known = [row for row in rows if row.figures["AP"][0] is not None]
    values = {row.name: [100 * run.evaluations[-1]["AP"] for run in row.runs if run.evaluations[-1]["AP"] is not None]
              for row in known}
    if not known:
        return tag("p", "No AP is known.")
    scale, items = axis("AP", [value for own in values.values() for value in own], 0), []
    for row in known:
        own, ap = values[row.name], with_deviation(*row.figures["AP"])
        mark = Mark(sum(own) / len(own), *((min(own), max(own)) if len(own) > 1 else (None, None)))
        items.append(tag("li", who(row), tag("div", tag("p", f"AP {ap}"), class_="said"),
                         tag("div", strip([mark], scale, f"AP of {row.name}: {ap}", zero=None), class_="drawn")))
    key = tag("p", "Dots: AP at the last evaluation, in points; lines: from the lowest to the highest of the seeds.",
              class_="about")
    items.append(tag("li", key, tag("div", ruler(scale), class_="drawn"), class_="key"))
    return tag("ol", *items, class_="verdicts plain")
