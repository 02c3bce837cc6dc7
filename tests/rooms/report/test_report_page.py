"""Whole pages, read as text and opened in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_run import HOSTILE, TOKENS, results, write_run

from surpass.report.page import write_comparison, write_quickstart_report, write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
FLAGS = (
    "--headless --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --virtual-time-budget=5000 --dump-dom"
)
# What a browser would fetch. Names of XML namespaces look like addresses and are none.
LOADED = re.compile(r"""(?:src|href|action)=["']?(?:https?:)?//|url\(["']?(?:https?:)?//|@import""")
SCRIPT = re.compile(r"<script\b[^>]*>.*?</script>", re.DOTALL)


def dom(page: Path, profile: Path, action: str = "") -> str:
    """The document after its scripts ran, without them. action: JavaScript run at the end."""
    assert BROWSER is not None
    acting = profile / "acting.html"
    profile.mkdir()
    html = page.read_text(encoding="utf-8")
    acting.write_text(html.replace("</body>", f"<script>{action}</script></body>"), encoding="utf-8")
    flags = [*FLAGS.split(), *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # root may not use the sandbox
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={profile}", acting.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return SCRIPT.sub("", done.stdout)


def without_scripts(page: Path) -> str:
    return SCRIPT.sub("", page.read_text(encoding="utf-8"))


def test_a_report_names_its_numbers_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run"))
    assert page == tmp_path / "run" / "report.html"
    text = without_scripts(page)
    assert "pass@1 rose from 25.0% to 50.0% in 50 steps" in text
    assert "overall: pass@1 25.0% [20.0%, 30.0%] → 50.0% [45.0%, 55.0%]" in text
    assert "method.reward_scale" in text
    assert "default-src 'none'" in text
    assert not LOADED.search(text)
    assert "<script src" not in page.read_text(encoding="utf-8")


def test_hostile_text_stays_text_in_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config={"student": HOSTILE})
    html = write_report(run).read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "&lt;/script&gt;" in html  # the setting
    assert "\\u003c/script\\u003e" in html  # the token


def test_a_run_without_samples_or_evaluations_has_neither_section(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", samples=0)
    (folder / "evaluations.jsonl").unlink()
    text = without_scripts(write_report(folder))
    assert 'id="viewer"' not in text
    assert "<h2>Evaluation</h2>" not in text
    assert "50 steps; reward 0.010 at the first and 0.500 at the last" in text


def test_a_comparison_points_out_settings_that_differ_undeclared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(
        tmp_path / "b", level=0.9, config={"method": {"reward_scale": 1.25}, "student": "other"}
    )
    knobs = ["method.reward_scale"]
    text = without_scripts(write_comparison([first, second], tmp_path / "c.html", knobs))
    assert "These runs differ in student besides method.reward_scale" in text
    assert "90.0%" in text
    fair = without_scripts(write_comparison([first, second], tmp_path / "c.html", [*knobs, "student"]))
    assert "These runs differ" not in fair


def test_the_quickstart_report_holds_results_sweep_and_runs(tmp_path: Path) -> None:
    for name in ("OPD", "ExOPD"):
        write_run(tmp_path / name)
    summary = results(OPD=(0.7, 0.7), ExOPD=(0.9, 0.9))
    summary["sweep"] = [
        {"lambda": x, "domain": "addition", "pass@1": 0.5, "low": 0.4, "high": 0.6, "seed": 0}
        for x in (1, 1.25)
    ]
    text = without_scripts(write_quickstart_report(tmp_path, summary))
    assert "ExOPD is above OPD on 2 of 2 domains." in text
    assert "λ sweep: addition" in text
    assert "seeds 0, 1" in text
    assert text.index("<h2>Training</h2>") < text.index('id="viewer"')


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser")
def test_in_a_browser_tokens_tooltips_and_plots_appear(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run"))
    hover = (
        'const over = new PointerEvent("pointerover", {bubbles: true});'
        'document.querySelectorAll(".token")[3].dispatchEvent(over);'
        'document.title += " " + performance.getEntriesByType("resource").length;'
    )
    shown = dom(page, tmp_path / "profile", hover)
    tokens = re.findall(r'<span class="token[^"]*" data-index="\d+"[^>]*>', shown)
    assert len(tokens) == len(TOKENS)
    assert (
        sum(" pos" in t for t in tokens) == sum(" neg" in t for t in tokens) == 5
    )  # advantages alternate in sign
    assert all(f'<span class="ws">{mark}</span>' in shown for mark in "·⏎→∅")
    tip = shown[shown.index('data-part="tip"') :]
    # Token 3: advantage −0.25, student −0.155, teacher −0.44, reference −1.
    for number in ("−0.250", "−0.285", "−0.155", "−0.440", "−1.000", "+0.845", "+0.560", "p 85.6%"):
        assert f">{number}<" in tip, number
    assert shown.count('class="main-svg"') > 10
    assert "<title>run: surpass 0</title>" in shown  # nothing hostile ran, and nothing was fetched
    assert not LOADED.search(shown)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser")
def test_in_a_browser_signal_and_sample_can_be_chosen(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run"))
    act = (
        'document.querySelectorAll(".sample")[1].click();'
        "const signal = document.querySelector('[data-part=\"signal\"]');"
        'signal.value = String([...signal.options].findIndex((o) => o.text === "teacher − reference"));'
        'signal.dispatchEvent(new Event("change"));'
        'document.querySelector(".tokens").dispatchEvent(new KeyboardEvent("keydown", {key: "Home"}));'
    )
    shown = dom(page, tmp_path / "profile", act)
    assert re.search(r'aria-pressed="true"><span class="sample-id">sum-1</span>', shown)
    # The first token has no reference log-prob: hatched, and the tooltip says so.
    assert re.search(r'class="token[^"]*\bna\b[^"]*" data-index="0"', shown)
    assert re.search(r'<tr class="active"><td>teacher − reference</td><td class="num">n/a<', shown)
