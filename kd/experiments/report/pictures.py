"""What detectors find on the images where they differ most."""
import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import counted
from data.images import encode_picture

from ...evaluation.analyze import found_from
from ...evaluation.tide import CORRECT, Judged
from ...inference.draw import enlarge
from ..compare import Row
from .answer import best_first, distilled_first
from .charts import place
from .checkpoints import Evidence, Measured
from .html import Html, breakable, join, left_out, tag

SIDE, QUALITY = 320, 60  # the longer side of a picture in pixels, and its quality as JPEG: about 15 kB


@dataclass
class Column:
    """A detector beside the others."""

    title: str
    measured: Measured


def pictures_part(rows: Sequence[Row], evidence: Evidence, count: int, score_thr: float, advice: Html) -> Html:
    """Pictures of teacher, student alone and distilled student; without distillation, of the worst and best setting."""
    if not evidence.measured:
        return left_out("pictures. They need the checkpoints of the runs, and the images. ", advice)
    columns = columns_of(rows, evidence)
    compared = [column.measured for column in columns[-2:]]
    if len(columns) == 1:
        order, said = worst_images(compared[0], score_thr, count)
    else:
        order, said = differing_images(columns[-2], columns[-1], score_thr, count)
    drawn = [picture(number, index, columns, score_thr) for number, index in enumerate(order)]
    key = tag("ul", *(tag("li", tag("svg", box((2, 3, 26, 12), kind, ""), viewBox="0 0 30 18", class_="sample",
                                    aria_hidden="true"), text) for kind, text in (
        ("object", "an object"), ("right", "an object that is found"), ("wrong", "a box that finds no object"),
        ("lost", "an object that is not found"))), class_="legend")
    hint = tag("p", "Point at a box to see its class and score.", class_="about screen")
    return join(said, key, hint if drawn else None, *drawn)


def columns_of(rows: Sequence[Row], evidence: Evidence) -> list[Column]:
    """The detectors to show, of one seed; the last two are those that are compared."""
    by_name = {row.name: row for row in rows}
    for row in distilled_first(rows):
        base = by_name.get(row.verdict.baseline)
        others = {run.seed: run for run in base.runs if run.path in evidence.measured} if base else {}
        for run in row.runs:
            if run.path in evidence.measured and run.seed in others:
                teacher = evidence.teachers.get(run.path)
                return [*([Column("the teacher", teacher)] if teacher else []),
                        Column(base.name, evidence.measured[others[run.seed].path]),
                        Column(row.name, evidence.measured[run.path])]
    known = [(row, evidence.measured[run.path], evidence.teachers.get(run.path))
             for row in [*distilled_first(rows), *best_first(rows)] for run in row.runs[:1]
             if run.path in evidence.measured]
    best, measured, teacher = known[0]
    same = [(row, one) for row, one, _ in known[1:] if one.dataset.image_ids == measured.dataset.image_ids
            and one.analysis.annotations == measured.analysis.annotations]
    if same:
        return [Column(same[-1][0].name, same[-1][1]), Column(best.name, measured)]
    return [Column(best.name, measured)]


def mistakes(one: Measured, score_thr: float) -> np.ndarray:
    """(N,) for each image, objects that are not found and boxes that find no object."""
    judged, images = one.analysis.judged, len(one.dataset)
    missed = judged.object_image[~found_from(judged, score_thr)]
    wrong = judged.image[(judged.kind != CORRECT) & (judged.score >= score_thr)]
    return np.bincount(missed, minlength=images) + np.bincount(wrong, minlength=images)


def differing_images(base: Column, own: Column, score_thr: float, count: int) -> tuple[list[int], Html]:
    """Images with the largest differences to both sides, and what is said about them."""
    ahead = mistakes(base.measured, score_thr) - mistakes(own.measured, score_thr)
    better, worse = ([i for i in np.argsort(-gain, kind="stable") if gain[i] > 0] for gain in (ahead, -ahead))
    few = min(len(worse), count // 2)
    better = better[:count - few]
    worse = worse[:count - len(better)]
    many = int((ahead > 0).sum()), int((ahead < 0).sum()), int((ahead == 0).sum())
    said = tag("p", "Of ", counted(len(ahead), "image"), ", ", tag("strong", breakable(own.title)),
               f" makes fewer mistakes than {base.title} on {many[0]}, more on {many[1]}, and as many on {many[2]}. "
               f"{what_a_mistake_is(score_thr)} Below: " + " and ".join(text for text in (
                   f"{counted(len(better), 'image')} on which it is ahead most" if better else None,
                   f"{counted(len(worse), 'image')} on which it is behind most" if worse else None,
                   "no image, because they do not differ" if not better and not worse else None) if text) + ".")
    return [int(i) for i in (*better, *worse)], said


def worst_images(one: Measured, score_thr: float, count: int) -> tuple[list[int], Html]:
    """Images with the most mistakes of a single detector."""
    own = mistakes(one, score_thr)
    order = np.argsort(-own, kind="stable")[:count]
    said = (f"On {counted(int((own == 0).sum()), 'image')} of {len(own)} there is no mistake. "
            f"{what_a_mistake_is(score_thr)} Below: the images with the most of them.")
    return [int(i) for i in order], tag("p", said)


def what_a_mistake_is(score_thr: float) -> str:
    return (f"A mistake is an object that is not found, or a box that finds no object (IoU 0.5, right class, scores of "
            f"{score_thr:g} or more).")


def picture(number: int, index: int, columns: Sequence[Column], score_thr: float) -> Html:
    """An image with its objects, and with what each detector finds. The image is in the page once.

    Args:
        index: of the image among those that were judged.
    """
    dataset = columns[-1].measured.dataset
    ids = dataset.image_ids  # judged in the order of their ids
    at = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))[index]
    image = dataset.original(at)
    zoom = min(1.0, SIDE / max(image.shape[1:]))
    small = enlarge(image, zoom)
    height, width = small.shape[1:]
    content = base64.b64encode(encode_picture(small, quality=QUALITY)).decode()
    name, classes = f"picture-{number}", columns[-1].measured.analysis.classes
    photo = tag("image", id=name, href=f"data:image/jpeg;base64,{content}", width=width, height=height)
    truth, objects = boxes_of(columns[-1].measured.analysis.judged, index, classes, zoom, None)
    shots = [shot("annotated", counted(objects["object"], "object"), (width, height), photo, truth)]
    for column in columns:
        drawn, counts = boxes_of(column.measured.analysis.judged, index, classes, zoom, score_thr)
        wrong = counted(counts["wrong"], "wrong box")
        caption = f"{counts['right']} found, {counts['lost']} not found, {wrong}"
        shots.append(shot(column.title, caption, (width, height), tag("use", href=f"#{name}"), drawn))
    return tag("section", tag("h3", dataset.file_names[at]), tag("div", *shots, class_="shots"), class_="picture")


def boxes_of(judged: Judged, index: int, classes: Sequence[str], zoom: float, score_thr: float | None
             ) -> tuple[list[Html], dict[str, int]]:
    """Boxes on an image, and how many there are of each kind; without `score_thr`, the annotated objects."""
    rows, here = [], np.flatnonzero(judged.object_image == index)
    found = None if score_thr is None else found_from(judged, score_thr)
    for i in here:
        if found is None or not found[i]:
            name = classes[judged.object_label[i]]
            rows.append((judged.object_box[i], "object" if found is None else "lost", name))
    for i in np.flatnonzero((judged.image == index) & (judged.score >= (2 if score_thr is None else score_thr))):
        kind = "right" if judged.kind[i] == CORRECT else "wrong"
        rows.append((judged.box[i], kind, f"{classes[judged.label[i]]} {judged.score[i]:.2f}"))
    counts = {kind: sum(row[1] == kind for row in rows) for kind in ("object", "right", "wrong", "lost")}
    return [box(tuple(zoom * side for side in own), kind, text) for own, kind, text in rows], counts


def box(sides: tuple[float, ...], kind: str, text: str) -> Html:
    """A box x, y, width, height on a dark edge, so that it is seen on any picture."""
    x, y, width, height = map(place, sides)
    where = {"x": x, "y": y, "width": width, "height": height}
    return tag("g", tag("title", text) if text else None, tag("rect", **where, class_="edge"),
               tag("rect", **where, class_=kind), class_="box")


def shot(title: str, caption: str, size: tuple[int, int], photo: Html, boxes: Sequence[Html]) -> Html:
    text = f"{title}: {caption}"
    drawn = tag("svg", photo, *boxes, viewBox=f"0 0 {size[0]} {size[1]}", role="img", aria_label=text)
    return tag("figure", drawn, tag("figcaption", tag("strong", breakable(title)), tag("span", caption)))
