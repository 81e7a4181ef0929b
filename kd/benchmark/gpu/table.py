"""The report of `scripts/gpu.py` as Markdown, for RESULTS.md."""
from collections.abc import Iterator

from data.errors import counted
from data.tables import markdown_table, points


def format_gpu(report: dict) -> str:
    """Tables of the steps and of mixed precision, then a line for each other part."""
    on, work = report["machine"], report["workload"]
    height, width = work["size"]
    lines = [f"{on['device']}, torch {on['torch']}, commit {(on['commit'] or 'unknown')[:12]}, {on['date'][:10]}; "
             f"{counted(work['batch'], 'image')} of {height} x {width} a step, medians of "
             f"{counted(work['rounds'], 'round')}."]
    for table in (steps_table(report), parity_table(report)):
        lines += ["", table] if table else []
    lines += ["", *[f"- {line}" for line in others(report)]]
    if text := done(report, "benchmark").get("text"):
        lines += ["", "```text", text, "```"]
    return "\n".join(lines)


def done(report: dict, name: str) -> dict:
    """The result of a part, empty if it has none."""
    return report["parts"].get(name, {}).get("result", {})


def of_kind(report: dict, kind: str) -> Iterator[tuple[list[str], dict]]:
    """The rest of the name, and the result, of each part of a kind that has one."""
    for name, entry in report["parts"].items():
        first, *rest = name.split("/")
        if first == kind and "result" in entry:
            yield rest, entry["result"]


def steps_table(report: dict) -> str:
    """Each way to compute a step; the share of the GPU's rate uses the operations that the step has when eager."""
    rate = done(report, "matmul").get("flops_per_second")
    found = [("/".join(rest[:-1]), rest[-1], result) for rest, result in of_kind(report, "step")]
    flops = {name: result["flops"] for name, _, result in found if result["flops"]}
    rows = []
    for name, variant, result in found:
        share = "-" if rate is None or name not in flops else f"{flops[name] / result['ms'] * 1e3 / rate:.1%}"
        peak = result["peak_memory_bytes"]
        rows.append([name, variant, f"{result['ms']:.1f}", f"{result['least_ms']:.1f} to {result['most_ms']:.1f}",
                     f"{result['images_per_second']:.1f}", "-" if peak is None else f"{peak / 2 ** 30:.2f}", share])
    header = ["training step", "how", "ms", "range", "images/s", "peak GiB", "of bf16 matmul rate"]
    return markdown_table(header, rows) if rows else ""


def parity_table(report: dict) -> str:
    """The largest differences between mixed precision and float32."""
    rows = []
    for (*name, amp), result in of_kind(report, "parity"):
        worst = max(result["losses"], key=result["losses"].get)
        rows.append(["/".join(name), amp, f"{result['losses'][worst]:.2%}", worst, f"{result['gradient']:.2%}",
                     f"{result['bounds']['loss']:.1%}, {result['bounds']['gradient']:.0%}"])
    header = ["losses of", "precision", "largest difference", "of", "of the gradient", "allowed"]
    return markdown_table(header, rows) if rows else ""


def others(report: dict) -> list[str]:
    """Lines about the parts that are not in a table, and about those without a result."""
    lines = []
    if rate := done(report, "matmul").get("flops_per_second"):
        lines.append(f"bf16 matrix products: {rate / 1e12:.3g} TFLOP/s")
    for (*name, amp), result in of_kind(report, "synchronisations"):
        where = ", ".join(result["where"])
        lines.append(f"synchronisations in a step of {'/'.join(name)}, amp {amp}: {result['per_step']:g}"
                     + (f" ({where})" if where else ""))
    for name, result in of_kind(report, "feed"):
        ms = ", ".join(f"{how} {value:.1f} ms" for how, value in result.items())
        lines.append(f"a step of {'/'.join(name)} with its batch copied from pinned memory: {ms}")
    if tests := done(report, "tests"):
        lines.append(f"tests: {tests['summary']}")
    if training := done(report, "training"):
        lines.append(f"training of {training['configuration']}: AP {points(training['AP'])}, AP50 "
                     f"{points(training['AP50'])} after {counted(training['epochs'], 'epoch')} in "
                     f"{training['minutes']:.1f} minutes")
    for name, entry in report["parts"].items():
        if entry["status"] != "done":
            lines.append(f"{name}: {entry['status']}, {entry.get('error') or entry['reason']}")
    return lines
