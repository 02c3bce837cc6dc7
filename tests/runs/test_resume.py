"""A killed run, gone on with, ends in the very bytes of the run that was never disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Checkpoints, arguments, config, metrics, run, weights

from surpass.cli.main import main
from surpass.methods.base import Method, RoleSpec
from surpass.methods.exopd import ExOPD
from surpass.methods.grpo import GRPO
from surpass.methods.opd import OPD
from surpass.methods.run import Run, Weight
from surpass.methods.sft import SFT
from surpass.models.policy import Lora
from surpass.records import Rollouts
from surpass.train.progress import RichBar


@dataclass(kw_only=True)
class Anchored(OPD):
    """A method with a role that follows the student, whose place must be restored too."""

    keep: float | None = None
    updates: int | None = None

    def roles(self) -> dict[str, RoleSpec]:
        source = "ema" if self.keep is not None else "copy"
        return {"anchor": RoleSpec(source, keep=self.keep, updates=self.updates)}

    def weights(self, run: Run, batch: Rollouts) -> dict[str, Weight]:
        return {"teacher": 1.5, "anchor": -0.5}

    def score(self, run: Run, rollouts: Rollouts) -> Rollouts:
        return run.score(super().score(run, rollouts), "anchor", self.want())


@dataclass(kw_only=True)
class Remembering(SFT):
    """A method that learns each step a little less, by a counter of its own."""

    seen: int = 0

    def collect(self, run: Run, prompts: list[Any]) -> Rollouts:
        self.seen += len(prompts)
        return super().collect(run, prompts)

    def loss(self, run: Run, batch: Rollouts) -> Any:
        loss = super().loss(run, batch)
        (term,) = loss.terms
        return type(loss)((self.term("cross_entropy", term.values / self.seen, "data"),), loss.metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def stop_after(updates: int, number: signal.Signals) -> Callable[[Mapping[str, float]], None]:
    """Send ourselves a signal right after that many optimiser updates."""

    def watch(row: Mapping[str, float]) -> None:
        if row["update"] == updates:
            signal.raise_signal(number)

    return watch


def teacher(models: Checkpoints) -> dict[str, Any]:
    return {"teacher": models.teacher}


CASES: dict[str, tuple[Callable[[], Method], dict[str, Any], int]] = {
    # name: (method, settings, stop after how many updates)
    "exopd": (lambda: ExOPD(), {"train.steps": 5}, 3),
    "exopd in its first batch": (lambda: ExOPD(), {"train.minibatches": 2}, 1),
    "exopd full, inside a batch": (
        lambda: ExOPD(estimator="full"),
        {"train.minibatches": 2, "train.steps": 3},
        3,
    ),
    "grpo inside a batch": (
        lambda: GRPO(samples=4, kl_coefficient=0.1),
        {"train.minibatches": 2, "train.epochs": 2, "train.steps": 3, "rollout.max_new_tokens": 4},
        6,
    ),
    "lora": (lambda: ExOPD(), {"model.lora": Lora(rank=2, dropout=0.1), "train.minibatches": 2}, 5),
    "moving average": (lambda: Anchored(keep=0.8), {"train.steps": 6}, 4),
    "copy every three updates": (lambda: Anchored(updates=3), {"train.steps": 7}, 5),
    "method with a memory": (lambda: Remembering(), {"train.steps": 6}, 4),
    "schedule and domains": (
        lambda: ExOPD(reward_scale=2.0, reward_scale_start=1.0, reward_scale_steps=5),
        {
            "prompts": "embedded:sort+missing",
            "data.ratios": {"sort": 3, "missing": 1},
            "optimiser.schedule": "cosine",
            "optimiser.warmup_steps": 2,
            "optimiser.weight_decay": 0.1,
            "train.steps": 6,
        },
        3,
    ),
}


def rewards(file: Path) -> str:
    """A reward that tells random answers apart: how many lower-case letters they hold."""
    file.write_text(
        "def letters(completions, **_):\n"
        "    return [float(sum(c.islower() for c in turns[-1]['content'])) for turns in completions]\n"
    )
    return f"{file}:letters"


@pytest.mark.parametrize("case", list(CASES))
def test_stopped_and_resumed_is_undisturbed(
    case: str, models: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, changes, stop = CASES[case]
    number = signal.SIGINT if stop % 2 else signal.SIGTERM
    if isinstance(make(), GRPO):
        changes = {**changes, "judge.rewards": {rewards(tmp_path / "own.py"): 1.0}}
    elif not isinstance(make(), SFT):
        changes = {**changes, **teacher(models)}
    whole = run(config(models.student, tmp_path / "whole", **changes), make())
    broken = config(models.student, tmp_path / "broken", **changes)
    with pytest.raises(SystemExit) as leaving:
        run(broken, make(), stop_after(stop, number))
    assert leaving.value.code == 128 + number
    assert "--resume" in capsys.readouterr().out
    assert not (tmp_path / "broken" / "model").exists()
    assert metrics(tmp_path / "broken")[-1]["update"] == stop
    resumed = run(broken, make(), resume=True)
    assert weights(resumed) == weights(whole)
    # Everything but the clock is written as if nothing had happened, each update once.
    assert [timeless(row) for row in metrics(resumed)] == [timeless(row) for row in metrics(whole)]
    last = [sorted((folder / "checkpoints").iterdir())[-1] for folder in (whole, resumed)]
    for name in ("optimiser.safetensors", "roles/anchor.safetensors", "state.json"):
        files = [(folder / name) for folder in last]
        assert files[0].exists() == files[1].exists()
        if files[0].exists() and name != "state.json":
            assert files[0].read_bytes() == files[1].read_bytes()
    states = [json.loads((folder / "state.json").read_text()) for folder in last]
    for state in states:
        state["config"].pop("output")
    assert states[0] == states[1]


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "time" not in key}


def test_killed_without_warning(models: Checkpoints, tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything; the newest whole checkpoint is what remains."""
    changes = {"teacher": models.teacher, "train.steps": 40, "train.save_every": 4, "eval.every": 4}
    changes |= {"eval.prompts": "embedded:sort", "eval.limit": 2, "eval.samples": 1, "eval.ks": "[1]"}
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "surpass.cli.main", "train", "exopd"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *arguments(models.student, broken, **changes)], env=environment, stdout=out, stderr=out
        )
        try:
            while process.poll() is None and not (
                (broken / "metrics.jsonl").exists() and (broken / "metrics.jsonl").read_text().count("\n") > 9
            ):
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
    assert 9 < len((broken / "metrics.jsonl").read_text().splitlines()) < 40
    assert main(["train", "exopd", *arguments(models.student, broken, **changes), "--resume"]) == 0
    whole = tmp_path / "whole"
    assert main(["train", "exopd", *arguments(models.student, whole, **changes)]) == 0
    assert weights(broken) == weights(whole)
    assert [row["update"] for row in metrics(broken)] == list(range(1, 41))
    assert [timeless(row) for row in metrics(broken)] == [timeless(row) for row in metrics(whole)]
    assert (broken / "evaluations.jsonl").read_text() == (whole / "evaluations.jsonl").read_text()


def test_ctrl_c_on_the_command_line(
    models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "sft", *arguments(models.student, tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(RichBar, "show", lambda bar, row: stop_after(2, signal.SIGINT)(row))
        with pytest.raises(SystemExit) as leaving:
            main(given)
    assert leaving.value.code == 130
    said = capfd.readouterr().out
    assert "step_000002" in said and "same command and --resume" in said
    assert main([*given, "--resume"]) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_second_signal_stops_at_once(models: Checkpoints, tmp_path: Path) -> None:
    def twice(row: Mapping[str, float]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(config(models.student, tmp_path), SFT(), twice)
    assert not (tmp_path / "checkpoints").exists()
    # The handlers of whoever called are back.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_position_and_counters_go_on(models: Checkpoints, tmp_path: Path) -> None:
    changes = {"teacher": models.teacher, "train.steps": 6}
    with pytest.raises(SystemExit):
        run(config(models.student, tmp_path, **changes), OPD(), stop_after(4, signal.SIGTERM))
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["step"] == 4 and state["updates"] == 4
    assert state["stream"]["drawn"] == {"": 16}
    written = sum(row["tokens/generated"] for row in metrics(tmp_path))
    assert state["tokens"]["generated"] == written
    run(config(models.student, tmp_path, **changes), OPD(), resume=True)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    state = json.loads((last / "state.json").read_text())
    assert state["stream"]["drawn"] == {"": 24}
    assert state["tokens"]["generated"] == sum(row["tokens/generated"] for row in metrics(tmp_path)) > written


def test_resuming_a_finished_run_changes_nothing(models: Checkpoints, tmp_path: Path) -> None:
    folder = run(config(models.student, tmp_path), SFT())
    before, rows = weights(folder), metrics(folder)
    assert weights(run(config(models.student, tmp_path), SFT(), resume=True)) == before
    assert metrics(folder) == rows


def test_other_settings_are_named(models: Checkpoints, tmp_path: Path) -> None:
    run(config(models.student, tmp_path), SFT())
    other = config(models.student, tmp_path, **{"optimiser.learning_rate": 0.5, "rollout.temperature": 0.7})
    with pytest.raises(ValueError, match="other settings") as error:
        run(other, SFT(reduction="sequence_mean"), resume=True)
    said = str(error.value)
    assert "optimiser.learning_rate: was 0.01, is 0.5" in said
    assert "rollout.temperature: was 1.0, is 0.7" in said
    assert "method.reduction: was 'token_mean', is 'sequence_mean'" in said
    assert said.count(": was") == 3


def test_settings_that_do_not_change_what_is_learnt_may_differ(models: Checkpoints, tmp_path: Path) -> None:
    whole = run(config(models.student, tmp_path / "whole"), SFT())
    with pytest.raises(SystemExit):
        run(config(models.student, tmp_path / "run"), SFT(), stop_after(2, signal.SIGTERM))
    (tmp_path / "run").rename(tmp_path / "moved")
    other = config(models.student, tmp_path / "moved", **{"train.save_every": 1, "train.sample_every": 1})
    assert weights(run(other, SFT(), resume=True)) == weights(whole)


def test_nothing_to_resume(models: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume: there is no checkpoint in .*; start without it"):
        run(config(models.student, tmp_path), SFT(), resume=True)
