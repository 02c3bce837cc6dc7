"""Readers: loud about what is broken, tolerant of what a killed run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import sample, write_lines, write_run

from surpass.report.read import check_results, read_jsonl, read_run


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (len(run.metrics), len(run.evaluations), len(run.samples)) == (50, 4, 3)
    assert (run.name, run.config["seed"], run.notes) == ("run", 0, [])


def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_jsonl(file)
    file.write_text('{"step": 1}\n{"step": \n')  # complete line, hence not a cut one
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_jsonl(file)
    file.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object, found list"):
        read_jsonl(file)


def test_the_cut_last_line_of_a_killed_run_is_tolerated_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 51, "name": "é'.encode()[:-1])  # cut inside a character
    run = read_run(folder)
    assert len(run.metrics) == 50
    assert run.notes == ["metrics.jsonl: the last line (51) is cut short and was left out"]


def test_steps_repeated_after_a_resume_keep_the_later_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    rows = [
        {"step": step, "loss": loss} for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0))
    ]
    write_lines(folder / "metrics.jsonl", rows)
    run = read_run(folder)
    assert [row["loss"] for row in run.metrics] == [1.0, 20.0, 30.0]
    assert "2 rows of steps repeated" in run.notes[0]


def test_signals_that_do_not_match_the_tokens_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_lines(folder / "samples" / "step_000020.jsonl", [sample(signals={"advantage": [1.0]})])
    with pytest.raises(ValueError, match="'advantage' has 1 values for 10 tokens"):
        read_run(folder)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        read_run(tmp_path)


def test_results_lacking_a_column_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\[0\] lacks \['pass@1'\]"):
        check_results({"rows": [{"model": "base", "domain": "addition"}]})
    with pytest.raises(ValueError, match="non-empty list 'rows'"):
        check_results({})
