"""A report as one page of HTML that needs nothing else: tables, and plots within it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .plots import calibration_plot, curves_plot, matrix_plot, rows_plot
from .view import full_label, gap_to, number, reference_row, with_interval

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
.dim { color: #777 }
.wide { overflow-x: auto }
"""


def html(report: Mapping[str, Any]) -> str:
    """The page: well-formed as XML too, and without any address outside itself."""
    body: list[str] = [f"<h1>Evaluation on {escape(report['file'])}</h1>", _about(report)]
    for metric, section in report["metrics"].items():
        body += [f"<h2>{metric.capitalize()}</h2>", _rows_table(section), _image(rows_plot(section, metric), metric)]
        body += ["<h3>By culture</h3>", _cultures_table(report["cultures"], section)]
        if len(section["rows"][0]["parts"]) > 1:
            body += ["<h3>By part of the file, pooled</h3>", _parts_table(section)]
        for matrix in section["matrices"]:
            title = f"Culture by expert, {matrix['committee']}"
            body += [f"<h3>{escape(title)}</h3>", _image(matrix_plot(matrix, metric), title)]
        body += ["<h3>Calibration of the options' probabilities</h3>", _option_calibration(section, metric)]
    if report["routing"]:
        body += ["<h2>Routing</h2>", _routing_table(report["routing"]), *_router_calibration(report["routing"])]
    body += ["<h2>Latency</h2>", _latency_table(report["latency"])]
    names = list(dict.fromkeys(name for one in report["curves"] for name in one["curves"]))
    if names:
        body.append("<h2>Training</h2>")
        body += [_image(curves_plot(report["curves"], name), f"training: {name}") for name in names]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" /><title>Evaluation</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _about(report: Mapping[str, Any]) -> str:
    left = ", ".join(f"{name} ({count})" for name, count in report["left_out"].items()) or "none"
    settings = report["settings"]
    text = (
        f"{report['questions']} questions, {len(report['cultures'])} cultures: {', '.join(report['cultures'])}. "
        f"Cultures without an expert, left out: {left}. Base {report['base']}, {report['dtype']}. Intervals of 95 %: bootstrap over "
        f"questions, {settings['resamples']} resamples."
    )
    seen = [
        f"{one['label']}: {', '.join(one['trained_on_this_file'])}"
        for one in report["committees"]
        if one["trained_on_this_file"]
    ]
    warning = f"<p><strong>Trained on this very file: {escape('; '.join(seen))}</strong></p>" if seen else ""
    return f'{warning}<p class="dim">{escape(text)}</p>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(header, "th")}</thead><tbody>\n{lines}\n</tbody></table></div>'


def _rows_table(section: Mapping[str, Any]) -> str:
    reference = reference_row(section)
    label = next(full_label(row) for row in section["rows"] if row["row"] == reference)
    header = (
        "row",
        "n",
        "mean of cultures",
        "pooled",
        "skill",
        f"{label}, less this row",
        "ECE",
        "relevant",
        "entropy",
    )
    rows = []
    for row in section["rows"]:
        asked = row["asked"] or {"relevant_share": None, "diversity_entropy": None}
        rows.append(
            (
                full_label(row),
                str(row["pooled"]["n"]),
                with_interval(row["macro"]),
                with_interval(row["pooled"]),
                with_interval(row["skill"], signed=True),
                with_interval(gap_to(section, reference, row["row"]), signed=True),
                number(row["ece"]),
                number(asked["relevant_share"]),
                number(asked["diversity_entropy"]),
            )
        )
    return _table(header, rows)


def _cultures_table(cultures: Sequence[str], section: Mapping[str, Any]) -> str:
    # Aggregations are compared above; a culture a column would be too wide with them.
    rows = [row for row in section["rows"] if row["row"].count("/") < 2 or row["row"].endswith("/mixture")]
    rows = [row for row in rows if any(one["n"] for one in row["cultures"].values())]
    lines = []
    for culture in cultures:
        n = max(row["cultures"][culture]["n"] for row in rows)
        if n:
            lines.append((culture, str(n), *(with_interval(row["cultures"][culture]) for row in rows)))
    return _table(("culture", "n", *(full_label(row) for row in rows)), lines)


def _parts_table(section: Mapping[str, Any]) -> str:
    names = [name for name, one in section["rows"][0]["parts"].items() if one["n"]]
    sizes = [f"{name}, n = {section['rows'][0]['parts'][name]['n']}" for name in names]
    lines = [(full_label(row), *(with_interval(row["parts"][name]) for name in names)) for row in section["rows"]]
    return _table(("row", *sizes), lines)


def _option_calibration(section: Mapping[str, Any], metric: str) -> str:
    up = "share of the answers" if metric == "similarity" else "share of right options"
    keys = {"base", "instruction-system", "blind", "table"}
    lines = {
        full_label(row): row["calibration"]
        for row in section["rows"]
        if row["row"] in keys or row["row"].endswith(("/expert", "/told/mixture", "/all/mixture"))
    }
    return _image(calibration_plot(lines, "probability of an option", up), "calibration of options")


def _routing_table(routing: Mapping[str, Any]) -> str:
    rows = []
    for committee, found in routing.items():
        kinds = {**{f"names {what}": one for what, one in (found["named"] or {}).items()}, "profile": found["profile"]}
        for what, one in kinds.items():
            if one is not None:
                cells = (
                    str(one["top1"]["n"]),
                    with_interval(one["top1"]),
                    with_interval(one["top3"]),
                    number(one["ece"]),
                )
                rows.append((committee, what, *cells, "–"))
        gate = found["gate"] or {}
        rows += [
            (committee, f"gate: {side} against neutral", str(gate[side]["n"]), "–", "–", "–", with_interval(gate[side]["auroc"]))
            for side in ("file", "questions")
            if side in gate
        ]  # fmt: skip
    return _table(("committee", "questions", "n", "first", "among three", "ECE of the weight", "AUROC"), rows)


def _router_calibration(routing: Mapping[str, Any]) -> list[str]:
    lines = {}
    for committee, found in routing.items():
        for what, one in {**(found["named"] or {}), "profile": found["profile"]}.items():
            if one is not None and what in ("all", "profile"):
                lines[f"{committee}, {'named' if what == 'all' else what}"] = one["calibration"]
    if not lines:
        return []
    plot = calibration_plot(lines, "weight of the likeliest expert", "share in which it is the culture's")
    return [_image(plot, "calibration of the router")]


def _latency_table(latency: Sequence[Mapping[str, Any]]) -> str:
    rows = [(one["who"], str(one["questions"]), f"{one['median_ms']:.1f}", f"{one['p90_ms']:.1f}") for one in latency]
    return _table(("asked, alone and with nothing cached", "questions", "median ms", "90 % ms"), rows)


def _image(png: bytes, what: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{escape(what)}" src="data:image/png;base64,{data}" /></p>'
