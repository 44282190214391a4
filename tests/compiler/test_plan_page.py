"""The report: complete, closed to the network, deaf to what a plan's names contain, and alive in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from meshwright.compiler.plan_files import Shown
from meshwright.compiler.plan_page import _families, plan_page
from meshwright.runtime.plan import Plan
from meshwright.runtime.plan_predictions import Beaten, TupleResult
from meshwright.runtime.plan_table import MEANINGS

from ..runtime.plans import GIB, certificate, plan, uniform

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = "</title></td><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'{{7*7}}{%"


def page(made: Plan, *notes: str) -> str:
    return plan_page(Shown("plan.json", made, notes))


def attacked() -> Plan:
    """A plan with hostile text in every field that is free text."""
    made = plan()
    sneaky = certificate(made.predicted.step_time_ns)
    rows = tuple(r.model_copy(update={"low_confidence": ATTACK}) for r in made.predicted.layers)
    return plan(
        ask=made.ask.model_copy(update={"model": ATTACK, "cluster": ATTACK, "options": (ATTACK,)}),
        model=made.model.model_copy(update={"name": ATTACK}),
        layers=tuple(r.model_copy(update={"kind": ATTACK, "options": r.options.model_copy(
            update={"variant": ATTACK, "why_not_runnable": ATTACK})}) for r in made.layers),
        training=made.training.model_copy(update={"recipe": ATTACK, "optimizer": ATTACK}),
        predicted=made.predicted.model_copy(update={"writer": ATTACK, "low_confidence": (ATTACK,), "layers": rows}),
        certificate=sneaky.model_copy(update={
            "recheck": ATTACK, "refused": tuple(r.model_copy(update={"axis": ATTACK, "value": ATTACK, "reason": ATTACK})
                                                for r in sneaky.refused),
            "tuples": tuple(t.model_copy(update={"title": ATTACK}) for t in sneaky.tuples)}),
        beaten=(Beaten(family=ATTACK, title=ATTACK, step_time_ns=None, binding=ATTACK),))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_everything_is_on_the_page() -> None:
    text = page(plan(), "the stages' costs differ")
    for wanted in ("tiny on 8 GPUs", "pp 2 1f1b, 8 micro-batches", "132 ms",
                   "125.4 ms to 142.6 ms (-5% to +8%): 12 published runs",
                   "MFU 41.0%", "recompute full", "limit 72 GiB", "exposed all-gather", "reduce-scatter", "bubble",
                   "optimizer", "activations", "gap", "pure data parallel", "3.00 GiB missing",
                   "equal within the error band", "3 does not divide 32 heads", "p=8 v=1 1f1b m=8", "prediction",
                   "not runnable yet", "the stages&#39; costs differ", "--cp 1", "meshwright why plan.json --verify"):
        assert wanted in text, wanted
    assert "Does not fit" not in text


def test_words_of_the_page_are_explained() -> None:
    text = page(plan())
    for name, meaning in MEANINGS.items():
        assert (f"{name}: {meaning}" in text) == any(s.memory_bytes.get(name) for s in plan().predicted.stages)
    assert "context: what CUDA" in text and "(log scale)" in text and "rotate(-90)" in text


def test_a_plan_that_does_not_fit_says_so() -> None:
    made = plan()
    stages = tuple(s.model_copy(update={"limit_bytes": 40 * GIB}) for s in made.predicted.stages)
    text = page(plan(predicted=made.predicted.model_copy(update={"stages": stages})))
    assert "Does not fit" in text and "stage 0 lacks 8.00 GiB above its limit of 40.00 GiB" in text


def test_families_of_the_search() -> None:
    rows = _families(plan())
    assert [r[:3] for r in rows] == [["2", "1f1b", "1"], ["4", "1f1b", "1"], ["8", "1f1b", "1"], ["1", "gpipe", "1"]]
    assert rows[0][4:] == ["132 ms", "+0.0%"] and rows[2][4] == "-" and rows[3][3] == "nothing fits"
    assert "By pipeline degree" in page(plan())


def test_a_plan_without_search_has_no_empty_sections() -> None:
    text = page(plan(certificate=None, beaten=()))
    assert "The search" not in text and "Why this plan" not in text and "Certificate" not in text


@pytest.mark.parametrize("made", [plan(), attacked(), uniform(pp=16, micro_batches=256, blocks=64)],
                         ids=["small", "attacked", "deep"])
def test_nothing_loads_and_nothing_runs(made: Plan) -> None:
    text = page(made)
    tags = Tags(text).tags
    assert not {t for t, _ in tags} & {"script", "img", "link", "iframe", "object", "embed", "a", "base", "form"}
    names = {name for _, attributes in tags for name in attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action", "style"} and not any(
        n.startswith("on") for n in names)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme:dark" in style
    policy = [a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_names_are_text() -> None:
    text = page(attacked())
    assert "<script" not in text and "onerror=alert(1)&gt;" in text and "{{7*7}}" in text and "49{" not in text
    assert text.count("&lt;script&gt;") > 20


def test_size_stays_small() -> None:
    made = uniform(pp=64, micro_batches=1024, blocks=126)
    step = made.predicted.step_time_ns
    many = tuple(TupleResult(title=f"p={i}", state="bounded", bound_ns=step + i * 10**5) for i in range(50_000))
    fields = {n: getattr(made, n) for n in Plan.model_fields}
    huge = plan(**{**fields, "certificate": certificate(step).model_copy(update={"tuples": many})})
    assert len(page(huge)) < 1_500_000


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome installed")


def browse(made: Plan, folder: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Open the plan's page in a real browser that can reach nothing."""
    assert BROWSER is not None
    path = folder / "plan.html"
    path.write_text(page(made), encoding="utf-8")
    return subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1200,2000",
         "--host-resolver-rules=MAP * ~NOTFOUND", *what, path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True)


@needs_browser
@pytest.mark.parametrize("made", [plan(), attacked(), uniform(pp=16, micro_batches=256, blocks=64)],
                         ids=["small", "attacked", "deep"])
def test_a_browser_keeps_all_of_it_and_complains_of_nothing(made: Plan, tmp_path: Path) -> None:
    done = browse(made, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    kept = Tags(done.stdout).tags
    assert {t for t, _ in kept} >= {"svg", "rect", "table", "circle"} and not {t for t, _ in kept} & {"script", "img"}
    assert len(kept) >= len(Tags((tmp_path / "plan.html").read_text(encoding="utf-8")).tags)
    assert "<title>owned" not in done.stdout


@needs_browser
def test_a_browser_draws_it_light_and_dark(tmp_path: Path) -> None:
    shots = []
    for scheme in ("0", "1"):  # dark, light
        browse(plan(), tmp_path, f"--blink-settings=preferredColorScheme={scheme}",
               f"--screenshot={tmp_path / scheme}.png")
        shots.append((tmp_path / f"{scheme}.png").read_bytes())
    assert all(len(s) > 20_000 for s in shots) and shots[0] != shots[1]
