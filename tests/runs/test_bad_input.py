"""What goes wrong says what was found, what was expected and what to do, and nothing is lost."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Checkpoints, arguments, config, metrics, run, weights, write_lines

from surpass.cli.main import main
from surpass.learn.aggregate import Loss
from surpass.methods.context_distillation import ContextDistillation
from surpass.methods.exopd import ExOPD
from surpass.methods.grpo import GRPO
from surpass.methods.run import Run
from surpass.methods.sft import SFT
from surpass.models.zoo import char_tokenizer, save_tiny
from surpass.records import Rollouts
from surpass.train.buffer import load_rollouts
from surpass.train.checkpoint import CheckpointError, load_position
from surpass.train.step import NonFiniteError

QUESTION = {"prompt": [{"role": "user", "content": "sort 321"}], "answer": "123", "response": "123"}


@pytest.fixture
def says(
    models: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit status and stderr, on one line, of `surpass train METHOD` with some settings."""

    def call(method: str, *more: str, student: str = models.student, **changes: Any) -> tuple[int, str]:
        given = arguments(student, tmp_path / "run", **{**changes, "train.steps": 1})
        try:
            status = main(["train", method, *given, *more])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return status, " ".join(capsys.readouterr().err.split())

    return call


Says = Callable[..., tuple[int, str]]


# -- prompts ------------------------------------------------------------------------------------------------------------


def test_a_missing_file(says: Says, tmp_path: Path) -> None:
    status, said = says("sft", prompts=tmp_path / "none.jsonl")
    assert status == 1 and "none.jsonl: there is no such file" in said


def test_a_malformed_line(says: Says, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(QUESTION) + '\n{"prompt": "half\n')
    status, said = says("sft", prompts=file)
    assert status == 1 and "some.jsonl line 2: not valid JSON" in said and "one JSON object per line" in said


def test_a_missing_field(says: Says, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "some.jsonl", [QUESTION, {"promt": "sort 321"}])
    status, said = says("sft", prompts=file)
    assert status == 1 and "line 2: no prompt" in said
    assert "did you mean 'promt'" in said and "data.fields.prompt" in said


def test_an_empty_prompt_set(says: Says, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "some.jsonl", [])
    status, said = says("sft", prompts=file)
    assert status == 1 and "some.jsonl: found no rows" in said
    status, said = says("sft", prompts="")
    assert status == 1 and "no prompts: set --prompts FILE" in said


def test_a_response_missing_where_the_method_learns_from_it(says: Says, tmp_path: Path) -> None:
    row = {key: value for key, value in QUESTION.items() if key != "response"}
    status, said = says("sft", prompts=write_lines(tmp_path / "some.jsonl", [row]))
    assert status == 1 and "has no response to learn from" in said and "data.fields.response" in said


def test_a_prompt_longer_than_the_model(models: Checkpoints, says: Says, tmp_path: Path) -> None:
    long = {"id": "long", "prompt": "9" * 300, "response": "9"}
    file = write_lines(tmp_path / "some.jsonl", [{**QUESTION, "id": "short"}, long])
    status, said = says("sft", prompts=file)
    assert status == 1
    assert "1 of 2 prompts are longer than 250 tokens (longest: 'long' with 300)" in said
    assert "set data.overlong to drop" in said
    status, said = says("sft", prompts=file, data__overlong="drop")
    assert status == 0 and "dropped 1 of 2 prompts longer than 250 tokens" in said


def test_no_room_for_any_prompt(says: Says) -> None:
    status, said = says("sft", rollout__max_new_tokens=256)
    assert status == 1 and "reads 256 tokens in all, so no prompt fits; lower it" in said


# -- settings -----------------------------------------------------------------------------------------------------------


def test_an_unknown_key_on_the_command_line(says: Says) -> None:
    status, said = says("sft", "--optimiser.learning_rat", "1e-3")
    assert status == 2 and "did you mean optimiser.learning_rate?" in said


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optimiser:\n  learnin_rate: 0.1\n", "did you mean optimiser.learning_rate?"),
        ("rollot:\n  temperature: 1.0\n", "rollot"),
        ("method:\n  reward_scal: 1.5\n", "did you mean method.reward_scale?"),
    ],
)
def test_an_unknown_key_in_yaml(text: str, hint: str, says: Says, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    status, said = says("exopd", "--config", str(tmp_path / "run.yaml"))
    assert status == 2 and hint in said


def test_yaml_that_is_none(says: Says, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: [1\n")
    status, said = says("exopd", "--config", str(tmp_path / "run.yaml"))
    assert status == 2 and "run.yaml" in said
    status, said = says("exopd", "--config", str(tmp_path / "none.yaml"))
    assert status == 2 and "none.yaml" in said


def test_a_tracker_that_is_not_installed(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surpass.train.build.find_spec", lambda name: None)
    status, said = says("sft", "--train.trackers", "[trackio]")
    assert status == 1 and "trackio, which is not installed: pip install 'surpass[trackio]'" in said


def test_a_value_of_the_wrong_type(says: Says) -> None:
    status, said = says("sft", "--train.steps", "many")
    assert status == 2 and "train.steps" in said and "many" in said


def test_an_unknown_method(says: Says) -> None:
    status, said = says("exodp")
    assert status == 1 and "unknown method 'exodp'; did you mean 'exopd'?" in said and "grpo" in said


def test_a_missing_checkpoint(says: Says, tmp_path: Path) -> None:
    status, said = says("sft", student=str(tmp_path / "none"))
    assert status == 1 and "cannot load a causal language model" in said and "config.json" in said


def test_a_folder_that_holds_a_run(models: Checkpoints, says: Says, tmp_path: Path) -> None:
    folder = run(config(models.student, tmp_path / "run"), SFT())
    before = weights(folder), metrics(folder)
    status, said = says("sft")
    assert status == 1 and "already holds a run" in said
    for way in ("--resume", "--overwrite", "--output"):
        assert way in said
    assert (weights(folder), metrics(folder)) == before
    assert says("sft", "--overwrite")[0] == 0
    assert len(metrics(folder)) == 1


# -- teachers and reference ---------------------------------------------------------------------------------------------


def test_no_teacher(says: Says) -> None:
    status, said = says("exopd")
    assert status == 1 and "needs a teacher: --teacher PATH, or --teachers.DOMAIN PATH" in said


def test_one_teacher_and_several(models: Checkpoints, says: Says) -> None:
    status, said = says("exopd", teacher=models.teacher, teachers=json.dumps({"sort": models.other}))
    assert status == 1 and "not both" in said


def test_domains_no_teacher_knows(models: Checkpoints, says: Says) -> None:
    given = {"prompts": "embedded:sort+missing", "teachers": json.dumps({"sort": models.teacher})}
    status, said = says("exopd", **given)
    assert status == 1 and "prompts of domain 'missing', but teachers for ['sort'] only" in said


def test_a_teacher_for_another_context_distillation(models: Checkpoints) -> None:
    for given in ({"teacher": models.teacher}, {"teachers": {"sort": models.teacher}}):
        with pytest.raises(ValueError, match="makes its teacher of the student itself, so --teacher"):
            run(config(models.student, Path("unused"), **given), ContextDistillation())


def test_a_teacher_with_another_vocabulary(says: Says, tmp_path: Path) -> None:
    save_tiny(tmp_path / "letters", tokenizer=char_tokenizer("abc321 "), hidden=16, heads=2, layers=1)
    status, said = says("opd", teacher=tmp_path / "letters")
    assert status == 1 and "the student and teacher have different vocabularies" in said
    assert "tokens differ, for example" in said and "absent" in said and "sequence_kd" in said


def test_extrapolation_without_a_reference(models: Checkpoints, says: Says) -> None:
    status, said = says("exopd", teacher=models.teacher, reference="null")
    assert status == 1 and "there is none: set --reference student" in said
    # lambda = 1 reads no reference, so none is missing.
    assert says("exopd", "--method.reward_scale", "1", teacher=models.teacher, reference="null")[0] == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rollout__top_p": 0.9}, "sampling is truncated (top_p 0.9"),
        ({"rollout__top_k": 5}, "sampling is truncated (top_p 1.0, top_k 5"),
        ({"rollout__min_p": 0.1}, "set rollout.top_p 1, rollout.top_k 0 and rollout.min_p 0"),
        (
            {"rollout__temperature": 0.7},
            "rollout.temperature is 0.7 and loss.temperature is 1.0; make them equal",
        ),
    ],
)
def test_ratios_under_another_law(
    changes: dict[str, Any], text: str, models: Checkpoints, says: Says
) -> None:
    for method in ("grpo", "opd", "exopd"):
        status, said = says(method, teacher=models.teacher, **changes)
        assert status == 1 and text in said
    # A divergence over the whole vocabulary weighs no sampled token, whatever drew it.
    assert says("opd", "--method.estimator", "full", teacher=models.teacher, **changes)[0] == 0


# -- checkpoints --------------------------------------------------------------------------------------------------------


def test_resuming_with_another_architecture(models: Checkpoints, says: Says, tmp_path: Path) -> None:
    student = str(shutil.copytree(models.student, tmp_path / "student"))
    settings = config(student, tmp_path / "run", train__steps=1)
    folder = run(settings, SFT())
    before = weights(folder)
    for other in ({"hidden": 32}, {"layers": 2}, {"architecture": "llama"}):
        shutil.rmtree(student)
        save_tiny(student, **{"architecture": "qwen3", "hidden": 16, "heads": 2, "layers": 1, **other})  # type: ignore[arg-type]
        status, said = says("sft", "--resume", student=student)
        assert status == 1 and "does not hold this student" in said
        assert "not the one the run was started from" in said
    assert weights(folder) == before


def test_a_full_disk_while_saving(
    models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint finds no space: the first stays whole, and the run goes on from it."""
    import surpass.train.checkpoint as module

    settings = config(models.student, tmp_path / "run", train__save_every=2)
    real, calls = module.save_file, []

    def full(*given: Any, **more: Any) -> None:
        calls.append(given)
        if len(calls) > 2:  # optimiser and generator of the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(CheckpointError, match="the disk is full") as error:
            run(settings, SFT())
    assert "previous checkpoint is whole" in str(error.value) and "step_000002" in str(error.value)
    assert "--resume" in str(error.value)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    whole = run(config(models.student, tmp_path / "whole"), SFT())
    assert weights(run(settings, SFT(), resume=True)) == weights(whole)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Makes every file beyond a size fail to be written, as the operating system reports it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_that_cannot_be_written(
    models: Checkpoints, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    """The real failure of the file system, through safetensors and transformers: weights are larger than 8 kB."""

    def limit(row: Mapping[str, float]) -> None:
        if row["update"] == 3:
            small_files(8192)

    settings = config(models.student, tmp_path / "run", train__save_every=2)
    with pytest.raises(CheckpointError, match=r"could not write .*step_000004") as error:
        run(settings, SFT(), limit)
    assert "previous checkpoint is whole" in str(error.value) and "step_000002" in str(error.value)
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert load_position(kept).step == 2


def test_no_checkpoint_at_all_says_so(
    models: Checkpoints, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    with pytest.raises(CheckpointError, match="There is no earlier checkpoint"):
        run(config(models.student, tmp_path / "run"), SFT(), lambda row: small_files(8192))


# -- judges and numbers -------------------------------------------------------------------------------------------------

VERIFIERS = """
import time

def hangs(completion, answer):
    if completion[:1].islower():
        time.sleep(60)
    return float(len(completion) % 2)

def raises(completion, answer):
    if completion[:1].islower():
        raise KeyError("no such rule")
    return float(len(completion) % 2)

def always_raises(completion, answer):
    raise KeyError("no such rule")
"""


@pytest.mark.parametrize(("name", "metric"), [("hangs", "timeouts"), ("raises", "errors")])
def test_a_verifier_that_fails_is_counted_and_the_run_goes_on(
    name: str, metric: str, models: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(VERIFIERS)
    changes = {"judge.verifier": f"{tmp_path / 'own.py'}:{name}", "judge.time_limit": 0.3}
    changes |= {"train.steps": 2, "train.prompts_per_step": 2}
    folder = run(config(models.student, tmp_path / "run", **changes), GRPO(samples=4))
    rows = metrics(folder)
    failed = [row[f"judge/{name}/{metric}"] for row in rows]
    # Seven letters in twenty are lower-case: some of 16 answers fail and some do not (checked, not assumed).
    assert len(rows) == 2 and 0 < sum(failed) < 16
    # Answers that were not judged are left out of the mean reward, not counted as wrong, and not trained.
    assert rows[0]["tokens/trained"] < rows[0]["tokens/generated"]


def test_a_verifier_that_fails_can_stop_the_run(says: Says, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(VERIFIERS)
    given = {"judge__verifier": f"{tmp_path / 'own.py'}:always_raises", "judge__on_failure": "raise"}
    status, said = says("grpo", "--method.samples", "2", **given)
    assert status == 1 and "verifier 'always_raises' failed on prompt" in said
    assert "no such rule" in said


def test_nothing_to_train_on_names_the_stream(says: Says, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(VERIFIERS)
    given = {"judge__verifier": f"{tmp_path / 'own.py'}:always_raises"}
    status, said = says("grpo", "--method.samples", "2", **given)
    assert status == 1 and "no token of stream 'trained' to train on" in said
    assert "judge did not leave out every one" in said


def test_nobody_knows_what_is_right(says: Says, tmp_path: Path) -> None:
    status, said = says("grpo", prompts=write_lines(tmp_path / "some.jsonl", [QUESTION]))
    assert status == 1 and "no verifier is known for prompts of domain ['default']" in said
    assert "judge.verifier" in said


@dataclass(kw_only=True)
class Diverging(SFT):
    """A loss that is not a number from some update on."""

    at: int = 3

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        loss = super().loss(run, batch)
        (term,) = loss.terms
        factor = float("nan") if run.updates + 1 >= self.at else 1.0
        return Loss((self.term("cross_entropy", term.values * factor, "data"),), {})


def test_a_loss_that_is_not_a_number(models: Checkpoints, tmp_path: Path) -> None:
    settings = config(models.student, tmp_path / "run", train__save_every=1)
    with pytest.raises(NonFiniteError, match="step 3, update 3: loss nan") as error:
        run(settings, Diverging())
    assert "weights were not changed" in str(error.value) and "learning rate" in str(error.value)
    saved = tmp_path / "run" / "bad_batch_step_000003"
    assert str(saved) in str(error.value)
    batch = load_rollouts(saved)
    assert batch is not None and len(batch) == 4 and batch.mask("data").all()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_000001",
        "step_000002",
    ]


def test_more_minibatches_than_answers(models: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.minibatches is 5, but the batch has only 4 answers"):
        run(config(models.student, tmp_path, train__minibatches=5), SFT())


def test_extrapolation_of_unequal_widths_needs_equal_tokens_only(models: Checkpoints, tmp_path: Path) -> None:
    """No error where none is due: a wider teacher is fine."""
    folder = run(
        config(models.student, tmp_path, teacher=models.wide, train__steps=1), ExOPD(estimator="full")
    )
    assert torch.tensor(metrics(folder)[0]["loss"]).isfinite()
