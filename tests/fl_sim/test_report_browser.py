"""The page in a real browser, where there is one: it draws, it filters, it opens runs, and it asks for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import made
import pytest

from fl_sim.report.page import page
from fl_sim.report.report import report_on

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
ACT = """<script>
const rows = () => document.querySelectorAll("#numbers tbody tr:not(.setting)").length;
const said = [rows()];
document.querySelector(".filters input").click();
said.push(rows());
document.querySelector(".filters button").click();
said.push(rows());
document.querySelectorAll("#numbers th button")[1].click();
document.querySelector("#numbers td.number a").click();
setTimeout(() => {
  const open = document.querySelector("#runs details[open]");
  said.push(open.querySelectorAll("tbody tr").length, open.querySelector("pre").textContent);
  document.body.append(`SAID ${said.join("|")} DIAS`);
}, 3000);
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_works(tmp_path: Path) -> None:
    for eraser, asr in (("none", 0.9), ("fine_tune", 0.4), ("nad", 0.2)):
        for seed in range(3):
            erase = [made.erase(2, (0.9, 0.9), (0.8, asr), eraser=eraser)] if eraser != "none" else []
            scores = [(0.5, 0.5), (0.8, asr), (0.9, asr + seed / 50), (0.9, asr)]
            made.run(tmp_path / f"{eraser}{seed}", seed, scores, *erase, eraser=eraser)
    target = tmp_path / "page.html"
    target.write_text(page(report_on([tmp_path])).replace("</body>", ACT))
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=9000", "--dump-dom", target.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    assert "[object" not in done.stdout
    [said] = re.findall(r"SAID ([^$]*?) DIAS", done.stdout)  # not the script's own words, which hold a $
    assert said.split("|") == ["3", "2", "3", "3", "fl-sim run a=b"]
    assert done.stdout.count("<figure>") == 3 + 1 + 2  # curves, cost, durability
