"""Every page opens in a real browser from file://, light and dark, without an error, and its pictures are drawn."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from loadgen import describe_html, plan_html, report_html
from loadgen.compose import Mix, compose, scale
from loadgen.fleets import Checked
from loadgen.judge import judge
from loadgen.plan import asked, plan
from loadgen.search import Share
from loadgen.sim.profiles import H100_8B_OWN
from loadgen.targets import PUBLISHED
from loadgen.workload import workload
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY
from tests.loadgen.test_search import comparison_page

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0")
DARK = "--blink-settings=preferredColorScheme=0"
WAIT_S = 180.0

# Run in the page: what a reader would see as broken comes back in the document's own text.
PROBE = """<script>addEventListener('load',()=>{const wrong=[];
document.querySelectorAll('figure svg').forEach((one,i)=>{const box=one.getBoundingClientRect();
if(box.width<100||box.height<40||!one.querySelector('circle,path,rect,polyline'))wrong.push('figure '+i+' is empty')});
const wide=document.documentElement;if(wide.scrollWidth>wide.clientWidth)wrong.push('the page scrolls sideways');
const look=getComputedStyle(document.body);document.body.dataset.probe=JSON.stringify({wrong,
background:look.backgroundColor,figures:document.querySelectorAll('figure svg').length})})</script>"""


def report() -> str:
    return report_html.page(judge(RUN, TWENTY, BUDGETS), TWENTY, BUDGETS)


def workload_page() -> str:
    trace = scale(compose(Mix(), seed=1, duration_s=100.0), 16)
    return describe_html.page("mix", trace, workload(trace))


def plan_page() -> str:
    trace = compose(Mix(), seed=1, duration_s=100.0)
    planned = plan(asked(trace, H100_8B_OWN.blocks_total * 64), H100_8B_OWN, PUBLISHED, spare=1, price_per_hour=2.5)
    sizes = [
        Checked(size, share.met >= share.wanted, {"chatbot+": share})
        for size, share in ((1, Share(0.93, 0.9, 0.97, 0.99)), (2, Share(0.995, 0.99, 1.0, 0.99)))
    ]
    return plan_html.page("mix <b>", planned, sizes, "simulated, not validated")


PAGES: dict[str, tuple[Callable[[], str], int]] = {
    "report": (report, 6),
    "workload": (workload_page, 5),
    "plan": (plan_page, 1),
    "comparison": (comparison_page, 1),
}


@pytest.fixture(scope="module")
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("no chromium on this machine: set CHROMIUM to one")
    return found


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_a_page_opens_and_draws(name: str, is_dark: bool, chromium: str, tmp_path: Path) -> None:
    make, figures = PAGES[name]
    path = tmp_path / "page.html"
    path.write_text(make().replace("</body>", PROBE + "</body>"), encoding="utf-8")
    more = [DARK] if is_dark else []
    command = [chromium, *FLAGS, *more, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900"]
    opened = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert "CONSOLE" not in opened.stderr
    seen = re.search(r'data-probe="([^"]*)"', opened.stdout)
    assert seen is not None
    said = seen.group(1).replace("&quot;", '"')
    assert '"wrong":[]' in said
    assert f'"figures":{figures}' in said
    assert ("rgb(20, 23, 29)" in said) == is_dark
