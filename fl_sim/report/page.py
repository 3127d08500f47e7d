"""One HTML file that needs nothing else: the report's numbers as JSON, and a script that draws them."""

from __future__ import annotations

import html
import importlib.resources
import json
import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fl_sim import __version__
from fl_sim.report.cases import text
from fl_sim.report.comparing import CONTROLS, control_of, setting
from fl_sim.report.curves import curve_bands, durability, erasing_marks, packed
from fl_sim.report.report import Report, Source, cell
from fl_sim.report.tables import COMPARED_HEADINGS, comparison_cells
from fl_sim.report.wording import (
    METHOD,
    NOTE,
    REFUSED_HEADINGS,
    REFUSED_NOTE,
    by_setting,
    left_out,
    marks,
    number,
    overview,
    refusals,
    seeds,
    sentence,
    setting_sentence,
)

SCRIPTS = ("drawing.js", "charts.js", "page.js")


def page(report: Report, *, title: str = "Report") -> str:
    """The whole page; nothing in it is fetched, which its own policy forbids."""
    template = importlib.resources.files("fl_sim.report") / "template"
    parts = {
        "TITLE": html.escape(title),
        "STYLE": (template / "page.css").read_text(encoding="utf-8"),
        "DATA": embedded(content(report, title)),
        "SCRIPT": "\n".join((template / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (template / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        before, mark, after = text.partition(f"<!--{name}-->")
        assert mark, name
        text = before + part + after
    return text


def embedded(value: object) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or opens a comment."""
    said = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        said = said.replace(char, f"\\u{ord(char):04x}")
    return said


def content(report: Report, title: str) -> dict[str, Any]:
    """All that the page shows."""
    common, rest = _configs([source.config for source in report.sources])
    devices = sorted({source.device for source in report.sources if source.device})
    return {
        "title": title,
        "overview": f"{overview(report)}." + (f" Devices: {', '.join(devices)}." if devices else ""),
        "made": f"fl-sim {__version__}, {datetime.now():%Y-%m-%d %H:%M}",
        "note": NOTE,
        "method": METHOD,
        "varied": {key: list(values) for key, values in report.grouped.varied.items()},
        "measures": [
            {"key": m.key, "name": m.name, "about": m.about, "better": m.better, "digits": m.digits}
            for m in report.measures
        ],
        "groups": _groups(report),
        "settings": {
            f"{kind}\n{name}": setting_sentence(report, indexes) for (kind, name), indexes in by_setting(report).items()
        },
        "runs": [_run(source, own) for source, own in zip(report.sources, rest, strict=True)],
        "common": common,
        "comparisons": [
            {"group": each.group, "control": each.control, "verdict": each.verdict, "cells": cells[2:]}
            for each in report.comparisons
            for cells in [comparison_cells(report, each)]
        ],
        "comparison_headings": COMPARED_HEADINGS[2:],
        "refusals": [{"group": index, "cells": words[2:], "notes": said} for index, words, said in refusals(report)],
        "refused_headings": REFUSED_HEADINGS[2:],
        "refused_note": REFUSED_NOTE,
        "detectors": report.detectors,
        "left_out": left_out(report),
    }


def _groups(report: Report) -> list[dict[str, Any]]:
    settings: dict[object, list[int]] = {}
    for index, group in enumerate(report.groups):
        settings.setdefault(setting(group), []).append(index)
    found = []
    for index, group in enumerate(report.groups):
        cells = {}
        for measure in report.measures:
            value = cell(group, measure.key)
            if value is not None:
                shown = number(value, measure) + marks(report, index, measure.key)
                cells[measure.key] = {"mean": value.mean, "half": value.half, "n": value.n, "text": shown}
        after = durability(group)
        found.append(
            {
                "kind": group.kind,
                "setting": group.setting,
                "defense": group.defense,
                "attacked": group.attacked,
                "varied": dict(group.varied),
                "seeds": seeds(group),
                "sentence": sentence(report, index),
                "cells": cells,
                "curves": {key: packed(found) for key, found in curve_bands(group).items()},
                "erasings": erasing_marks(group),
                "after": None if after is None else packed(after),
                "control": control_of(group, CONTROLS[0], report.groups, settings[setting(group)]),
                "cases": [
                    {
                        "run": case.run,
                        "seed": " ".join(map(str, case.seeds)),
                        "numbers": {
                            m.key: round(case.measures[m.key], 4) for m in report.measures if m.key in case.measures
                        },
                    }
                    for case in group.cases
                ],
            }
        )
    return found


def _run(source: Source, own: Mapping[str, str]) -> dict[str, Any]:
    argv = [*source.argv]
    return {
        "folder": str(source.folder),
        "command": shlex.join(argv) if argv else "",
        "state": source.state,
        "device": source.device,
        "config": dict(own),
    }


def _configs(configs: list[Mapping[str, Any]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What all configurations have in common, and the rest of each."""
    flats = [dict(_flat("", config)) for config in configs]
    common = dict(set.intersection(*(set(each.items()) for each in flats)))
    rest = [{key: value for key, value in each.items() if common.get(key) != value} for each in flats]
    return dict(sorted(common.items())), rest


def _flat(prefix: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(f"{prefix}{key}.", value)
        else:
            found.append((f"{prefix}{key}", text(value)))
    return found
