"""From words to typed settings, and from misspelt words to the nearest right ones."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from surpass.cli.main import main
from surpass.cli.parsing import parse, run_config, run_parser
from surpass.cli.train import read_settings
from surpass.config import RunConfig
from surpass.methods.exopd import ExOPD


def read(*arguments: str) -> RunConfig:
    return run_config(parse(run_parser("surpass test", ""), ["--student", "base", *arguments]))


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert read() == RunConfig("base")


def test_values_are_typed() -> None:
    config = read(
        *("--prompts", "a.jsonl", "--optimiser.learning_rate", "1e-5", "--eval.ks", "[1, 4]"),
        *(
            "--data.template_args",
            '{"enable_thinking": false}',
            "--reference",
            "null",
            "--model.lora.rank",
            "8",
        ),
    )
    assert config.prompts == "a.jsonl" and config.optimiser.learning_rate == 1e-5
    assert config.eval.ks == [1, 4] and config.data.template_args == {"enable_thinking": False}
    assert config.reference is None and config.model.lora.rank == 8


def test_domains_have_their_own_teachers_and_prompts() -> None:
    config = read(
        *("--teachers.math", "A", "--teachers.code", "B"),
        *("--prompts.math", "a.jsonl", "--prompts.code", "b.jsonl", "--data.ratios.math", "0.5"),
    )
    assert config.teachers == {"math": "A", "code": "B"}
    assert config.prompts == {"math": "a.jsonl", "code": "b.jsonl"}
    assert config.data.ratios == {"math": 0.5}


def test_the_command_line_is_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\ntrain:\n  steps: 7\n  epochs: 2\nteachers:\n  math: A\n")
    config = read("--config", str(file), "--train.steps", "9")
    assert (config.seed, config.train.steps, config.train.epochs) == (3, 9, 2)
    assert config.teachers == {"math": "A"}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--sead", "1"], "sead: did you mean seed?"),
        (["--train.step", "1"], "train.step: did you mean train.steps?"),
        (["--train.step=1"], "train.step: did you mean train.steps?"),
        (["--learning_rate", "1"], "learning_rate: did you mean optimiser.learning_rate?"),
        (["--optimizer.learning_rate", "1"], "did you mean optimiser.learning_rate?"),
    ],
)
def test_the_nearest_setting_is_named(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        read(*arguments)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and hint in said and "--help lists every setting" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--train.steps", "1.5"], "1.5"),
        (["--rollout.engine", "cloud"], "cloud"),
        (["--data.overlong", "cut"], "cut"),
        (["--data.shuffle", "perhaps"], "perhaps"),
    ],
)
def test_values_that_are_none_are_named(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        read(*arguments)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and word in said and arguments[0].lstrip("-") in said


def test_settings_a_method_refuses_are_said_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        read_settings("train", "grpo", ["--student", "base", "--method.samples", "1"])
    assert leaving.value.code == 2
    assert "a group needs at least 2 answers" in " ".join(capsys.readouterr().err.split())


def test_the_method_and_its_fields() -> None:
    _, method, parsed = read_settings(
        "train", "exopd", ["--student", "base", "--method.reward_scale", "1.5", "--method.guard_top1", "0.9"]
    )
    assert method == ExOPD(reward_scale=1.5, guard_top1=0.9)
    assert (parsed.resume, parsed.overwrite) == (False, False)


def test_every_setting_has_a_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--help` shows are the docstrings of the fields; a field without one would be a riddle."""
    monkeypatch.setenv("COLUMNS", "1000")

    def names(cls: type, prefix: str = "") -> list[str]:
        found = []
        for field in dataclasses.fields(cls):
            nested = getattr(field, "default_factory", None)
            if isinstance(nested, type) and dataclasses.is_dataclass(nested):
                found += names(nested, f"{prefix}{field.name}.")
            else:
                found.append(prefix + field.name)
        return found

    said = " ".join(help_of("eval", capsys).partition("options:")[2].split())
    silent = []
    for name in names(RunConfig):
        found = re.search(rf"--{re.escape(name)} (.*?)\((?:type|required)", said)
        assert found, f"--{name} is not in the help"
        values_and_text = found.group(1).split()
        if len(values_and_text) < 3:
            silent.append(name)
    assert not silent


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_errors_nobody_foresaw_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what this package says on purpose is shown as one sentence; a defect must not hide in one."""

    def broken(arguments: list[str]) -> int:
        raise ValueError(f"a defect far from any message, with {arguments}")

    monkeypatch.setattr("surpass.cli.report.main", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["report", "x"])


def test_a_path_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["data", "embedded", "sort", "--out", str(tmp_path / "file" / "x.jsonl")]) == 1
    assert "file" in capsys.readouterr().err
