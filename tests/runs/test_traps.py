"""What users of such libraries run into, and must not here: fifteen traps and where each is tested.

| trap | tests |
|---|---|
| 1. an estimator is named by the gradient it gives | rooms/learn/test_sampled, invariants/test_grpo |
| 2. another teacher, another gradient, in every recipe | here, invariants/test_* |
| 3. a log-ratio is an advantage, a divergence a loss | rooms/learn/test_sampled |
| 4. truncated divergences are never clamped, their mass is logged | here, rooms/learn/test_support |
| 5. unused columns, padding and micro-batches change nothing | here, invariants/test_micro_batches, rooms/learn/test_aggregate |
| 6. lengths, not ids, decide what is trained | here, rooms/rollout/test_local, rooms/models/test_forward |
| 7. padded vocabularies | here, rooms/roles/test_distribution, invariants/test_opd |
| 8. two temperatures; no ratios under a truncated law | test_bad_input, rooms/rollout/test_local |
| 9. token-in, token-out | here |
| 10. one template for all, or an error | here, rooms/prompts/test_templates |
| 11. nothing to train on, and ignored keys, are errors | test_bad_input, invariants/test_micro_batches |
| 12. a verifier's time-out is counted, not a reward of 0 | test_bad_input, rooms/judge/test_workers, rooms/judge/test_judge |
| 13. the cache stays on in rollouts; weights have versions | here, rooms/rollout/test_local |
| 14. seeds from (run, step, prompt, sample); exact resume | here, test_resume, rooms/rollout/test_local |
| 15. compared runs differ in the declared setting only | rooms/report/test_report_compare, rooms/report/test_report_page |
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Checkpoints, config, distance, metrics, run, tensors, weights, write_lines

from surpass.learn.aggregate import Loss
from surpass.methods.context_distillation import ContextDistillation
from surpass.methods.exopd import ExOPD
from surpass.methods.gkd import GKD
from surpass.methods.grpo import GRPO
from surpass.methods.minillm import MiniLLM
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.methods.sequence_kd import SequenceKD
from surpass.methods.sft import SFT
from surpass.methods.supervised_kd import SupervisedKD
from surpass.models.zoo import bpe_tokenizer, char_tokenizer, save_tiny
from surpass.records import Author, Prompt, Rollouts
from surpass.train.build import build


@dataclass(kw_only=True)
class Watched(OPD):
    """OPD that keeps what it collected and what it was asked to learn from."""

    collected: list[Rollouts] = field(default_factory=list)
    learnt: list[Rollouts] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    """Tokens per row of every forward while answers were written."""

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        def note(module: Any, given: tuple[Any, ...]) -> None:
            del module
            self.widths.append(given[0].shape[-1])

        hook = run.student.causal_lm.get_input_embeddings().register_forward_pre_hook(note)
        rollouts = run.generate(prompts, self.samples)
        hook.remove()
        self.collected.append(rollouts)
        return self.score(run, rollouts)

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        self.learnt.append(batch)
        return super().loss(run, batch)


# -- 2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        SequenceKD(),
        SupervisedKD(),
        GKD(),
        MiniLLM(),
        OPD(),
        OPD(estimator="top_k", top_k=4),
        OPD(estimator="full"),
        ExOPD(),
    ],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'estimator', '')}",
)
def test_another_teacher_gives_another_student(method: Any, models: Checkpoints, tmp_path: Path) -> None:
    found = [
        weights(
            run(
                config(models.student, tmp_path / Path(teacher).name, teacher=teacher, train__steps=1), method
            )
        )
        for teacher in (models.teacher, models.other)
    ]
    assert found[0] != found[1]


# -- 4 and 7 ------------------------------------------------------------------------------------------------------------


def test_the_mass_of_a_truncated_divergence_is_logged(models: Checkpoints, tmp_path: Path) -> None:
    masses = []
    for k in (4, 64):
        settings = config(models.student, tmp_path / str(k), teacher=models.teacher, train__steps=1)
        (row,) = metrics(run(settings, OPD(estimator="top_k", top_k=k)))
        assert 0 < row["support/student_mass"] <= 1 and 0 < row["support/target_mass"] <= 1
        masses.append(row["support/student_mass"])
    assert masses[0] < masses[1]


@pytest.fixture
def padded(tmp_path: Path) -> str:
    """A checkpoint with the usual tokenizer and 128 rows of embedding, as padding to a round number gives them."""
    size = {"hidden": 16, "heads": 2, "layers": 1, "initializer_range": 0.3}
    return str(save_tiny(tmp_path / "padded", vocab_size=128, seed=1, **size))  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["sampled", "top_k", "full"])
def test_a_teachers_vocabulary_may_be_padded(
    estimator: Any, padded: str, models: Checkpoints, tmp_path: Path
) -> None:
    """104 and 128 rows, one tokenizer: no token has another meaning, so there is nothing to refuse."""
    settings = config(models.student, tmp_path / "run", teacher=padded, train__steps=2)
    rows = metrics(run(settings, OPD(estimator=estimator)))
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows)
    if estimator == "full":
        # 24 random rows of 128 hold a visible share of the teacher's mass; what is cut is said.
        assert 0.01 < rows[0]["target_dropped"] < 0.9 and rows[0]["student_dropped"] == 0


def test_a_students_vocabulary_may_be_padded(padded: str, models: Checkpoints, tmp_path: Path) -> None:
    settings = config(padded, tmp_path / "run", teacher=models.teacher, train__steps=2)
    rows = metrics(run(settings, SupervisedKD()))
    assert 0.01 < rows[0]["student_dropped"] < 0.9 and rows[0]["target_dropped"] == 0
    # What only the student can write is a token the teacher cannot be asked about: no score is made up.
    with pytest.raises(ValueError, match="has a vocabulary of 104 tokens and is asked about token"):
        run(config(padded, tmp_path / "own", teacher=models.teacher), OPD())


# -- 5 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [OPD(), ExOPD(estimator="full"), GRPO(samples=2, kl_coefficient=0.1)],
    ids=["opd", "exopd", "grpo"],
)
def test_one_by_eight_is_two_by_four_is_eight_by_one(
    method: Any, models: Checkpoints, tmp_path: Path
) -> None:
    """Through the whole loop, optimiser included: how a step is cut into forwards is invisible.

    Answers differ in length (the stop string sees to it), so that a mean of means would show.
    """
    found, rows = {}, {}
    for budget in (1, 60, 10**6):  # a row, a few rows, all rows at once
        changes = {
            "train.token_budget": budget,
            "prompts": "embedded:sort+missing",
            "rollout.stop": ["a", "b", "c", "d", "e", "f", "1", "2", "3", "4"],
            "judge.rewards": {f"{lengths(tmp_path)}:lengths": 1.0},
            "train.steps": 3,
            "train.prompts_per_step": 8 // method.samples,
        }
        if not isinstance(method, GRPO):
            changes |= {"teacher": models.teacher, "judge.rewards": {}}
        folder = run(config(models.student, tmp_path / str(budget), **changes), method)
        found[budget], rows[budget] = tensors(folder / "model"), metrics(folder)
    assert rows[1][0]["completions/min_length"] < rows[1][0]["completions/max_length"]
    begun = tensors(Path(models.student))
    moved = distance(found[1], begun)
    assert moved > 0.05
    for budget in (60, 10**6):
        for mine, theirs in zip(rows[budget], rows[1], strict=True):
            # Float32 sums in another order; later steps start from weights that differ by as little.
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-4)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        # AdamW turns rounding in a vanishing gradient into a whole step of its sign; few weights have one.
        assert distance(found[budget], found[1]) < 0.02 * moved


def lengths(folder: Path) -> Path:
    """A reward function of its own: longer answers get more."""
    file = folder / "own.py"
    file.write_text(
        "def lengths(completions, **_):\n    return [float(len(t[-1]['content'])) for t in completions]\n"
    )
    return file


@pytest.mark.parametrize("method", [SFT(), OPD()], ids=["sft", "opd"])
def test_columns_nobody_reads_change_nothing(method: Any, models: Checkpoints, tmp_path: Path) -> None:
    question = {"prompt": [{"role": "user", "content": "sort 321"}], "response": "123"}
    found = []
    for name, more in {
        "bare": {},
        "full": {"answer": "99", "solution": "secret", "critique": "bad", "reward": 7, "level": None},
    }.items():
        file = write_lines(tmp_path / f"{name}.jsonl", [{"id": str(i), **question, **more} for i in range(4)])
        changes: dict[str, Any] = {} if isinstance(method, SFT) else {"teacher": models.teacher}
        found.append(weights(run(config(models.student, tmp_path / name, prompts=file, **changes), method)))
    assert found[0] == found[1]


# -- 6 ------------------------------------------------------------------------------------------------------------------


def test_eos_is_trained_although_it_is_the_padding_token(tmp_path: Path) -> None:
    """Answers of different lengths, padding = EOS: a student that learns "12" must learn to end it, too."""
    tokenizer = char_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    student = save_tiny(tmp_path / "student", tokenizer=tokenizer, hidden=32, heads=2, layers=1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    answers = {"sort 21": "12", "sort 54321": "12345"}
    file = write_lines(
        tmp_path / "two.jsonl",
        [
            {"prompt": [{"role": "user", "content": q}], "response": a, "answer": a}
            for q, a in answers.items()
        ],
    )
    settings = config(
        str(student),
        tmp_path / "run",
        prompts=file,
        **{
            "train.steps": 60,
            "train.prompts_per_step": 2,
            "rollout.max_new_tokens": 12,
            "eval.prompts": file,
            "eval.samples": 4,
            "eval.ks": [1],
            "judge.verifier": "exact",
        },
    )
    folder = run(settings, SFT())
    first, *_, last = metrics(folder)
    # 2 + 5 characters and two EOS.
    assert first["tokens/trained"] == 9 and last["loss"] < 0.1
    (overall,) = [r for r in evaluations(folder) if r["domain"] == "overall"]
    # Without a trained EOS every answer would run on to 12 tokens and be wrong.
    assert overall["pass@1"] > 0.8 and overall["clipped_ratio"] < 0.2


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


# -- 9 ------------------------------------------------------------------------------------------------------------------


def test_the_tokens_that_are_trained_are_those_that_were_sampled(tmp_path: Path) -> None:
    """A random model writes pieces no tokenizer would: reading its text again gives other tokens, and is never done."""
    tokenizer = bpe_tokenizer(["sorting the sorted digits, again and again and again"] * 4, 300)
    paths = [
        save_tiny(
            tmp_path / name,
            tokenizer=tokenizer,
            hidden=16,
            heads=2,
            layers=1,
            seed=seed,
            initializer_range=0.3,
        )
        for seed, name in enumerate(("student", "teacher"))
    ]
    method = Watched()
    changes = {"train.steps": 2, "train.minibatches": 2, "rollout.max_new_tokens": 16}
    run(config(str(paths[0]), tmp_path / "run", teacher=str(paths[1]), **changes), method)
    sampled = {tuple(ids) for batch in method.collected for ids in batch.response.tolist()}
    learnt = {tuple(ids) for batch in method.learnt for ids in batch.response.tolist()}
    assert learnt == sampled and len(sampled) == 8
    texts = tokenizer.batch_decode([list(ids) for ids in sampled])
    again = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]  # type: ignore[arg-type]
    assert sum(a == b for a, b in zip(again, sampled, strict=True)) < len(sampled)
    for batch in method.learnt:
        assert batch.by(Author.STUDENT).all() and batch.sampler_logp.isfinite().all()


# -- 10 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_template(models: Checkpoints, tmp_path: Path) -> str:
    """The teacher's weights with a chat template that greets first."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "Hello!" + str(tokenizer.chat_template)
    return str(
        save_tiny(
            tmp_path / "polite",
            tokenizer=tokenizer,
            hidden=16,
            heads=2,
            layers=1,
            seed=1,
            initializer_range=0.3,
        )
    )


def test_a_teacher_that_reads_another_template_is_refused(
    other_template: str, models: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="render prompts differently") as error:
        run(config(models.student, tmp_path / "run", teacher=other_template), OPD())
    assert "Hello!<|user|>" in str(error.value) and "data.template_args" in str(error.value)
    # Both ways of meaning it are allowed, and they are two different things.
    found = {
        choice: weights(
            run(
                config(
                    models.student, tmp_path / choice, teacher=other_template, data__teacher_template=choice
                ),
                OPD(),
            )
        )
        for choice in ("student", "own")
    }
    same = weights(run(config(models.student, tmp_path / "same", teacher=models.teacher), OPD()))
    assert found["student"] == same != found["own"]


def test_thinking_reaches_student_teacher_and_evaluation_alike(tmp_path: Path) -> None:
    tokenizer = char_tokenizer(thinking=True)
    paths = [
        save_tiny(tmp_path / name, tokenizer=tokenizer, hidden=16, heads=2, layers=1, seed=seed)
        for seed, name in enumerate(("student", "teacher"))
    ]
    method = Watched()
    changes = {
        "data.template_args": {"enable_thinking": False},
        "eval.prompts": "embedded:sort",
        "eval.limit": 1,
    }
    changes |= {"eval.samples": 1, "eval.ks": [1], "train.steps": 1}
    folder = run(config(str(paths[0]), tmp_path / "run", teacher=str(paths[1]), **changes), method)
    for text in tokenizer.batch_decode(method.collected[0].prompt_ids.tolist()):
        assert text.endswith("<|assistant|><think>\n\n</think>\n\n")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["first_prompt"].endswith("</think>\n\n")
    # An argument the template does not know would be without effect, and is refused.
    changes["data.template_args"] = {"enable_thinkin": False}
    with pytest.raises(ValueError, match=r"does not read template_args\.enable_thinkin"):
        run(config(str(paths[0]), tmp_path / "other", teacher=str(paths[1]), **changes), Watched())


def test_held_out_prompts_are_their_own_although_ids_repeat(models: Checkpoints, tmp_path: Path) -> None:
    """Files number their rows from 0; what is evaluated is the held-out question, not the trained one of that id."""

    def rows(first: int, digits: str) -> list[dict[str, Any]]:
        question = [{"role": "user", "content": f"sort {digits}"}]
        return [{"id": str(i), "prompt": question, "answer": str(first), "response": "1"} for i in range(2)]

    train, held_out = rows(1, "321"), rows(9, "987654")
    settings = config(
        models.student,
        tmp_path / "run",
        prompts=write_lines(tmp_path / "train.jsonl", train),
        **{
            "eval.prompts": write_lines(tmp_path / "eval.jsonl", held_out),
            "eval.samples": 1,
            "eval.ks": [1],
            "judge.verifier": "exact",
            "train.steps": 1,
        },
    )
    built = build(settings, SFT())
    texts = built.run.student.tokenizer.batch_decode(built.eval_ids.tolist())
    assert texts == ["<|user|>sort 987654<|end|><|assistant|>"] * 2
    (ids,) = built.run.prompt_ids(built.run.stream.peek(1)).tolist()  # type: ignore[union-attr]
    assert built.run.student.tokenizer.decode(ids) == "<|user|>sort 321<|end|><|assistant|>"


# -- privileged contexts ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WatchedContext(ContextDistillation):
    seen: list[Rollouts] = field(default_factory=list)
    teacher_ids: list[list[int]] = field(default_factory=list)

    def score(self, run: Run, rollouts: Rollouts) -> Rollouts:
        self.seen.append(rollouts)
        self.teacher_ids += run.teachers["default"].prompt_ids(rollouts).tolist()
        return super().score(run, rollouts)


def test_only_the_teacher_reads_the_solution(tmp_path: Path) -> None:
    student = save_tiny(tmp_path / "student", hidden=16, heads=2, layers=1, max_position_embeddings=1024)
    method = WatchedContext(samples=2)
    run(config(str(student), tmp_path / "run", **{"train.steps": 2, "rollout.max_new_tokens": 4}), method)
    tokenizer = char_tokenizer()
    students = [ids for batch in method.seen for ids in batch.prompt_ids.tolist()]
    prompts = [prompt for batch in method.seen for prompt in batch.prompts]
    assert len(students) == len(method.teacher_ids) == 16
    for prompt, mine, theirs in zip(prompts, students, method.teacher_ids, strict=True):
        solution = prompt.privileged["solution"]
        assert solution not in tokenizer.decode(mine) and solution in tokenizer.decode(theirs)
        assert str(prompt.answer) not in tokenizer.decode(mine)


# -- 13 -----------------------------------------------------------------------------------------------------------------


def test_the_cache_stays_on_in_rollouts_whatever_training_does(models: Checkpoints, tmp_path: Path) -> None:
    found, widths = [], []
    for checkpointing in (False, True):
        method = Watched()
        changes = {"model.gradient_checkpointing": checkpointing, "teacher": models.teacher}
        folder = run(config(models.student, tmp_path / str(checkpointing), **changes), method)
        longest = max(len(ids) for batch in method.collected for ids in batch.prompt_ids.tolist())
        # Prompts are read once, then one token at a time: without a cache every step would read all.
        assert max(method.widths) <= longest
        assert method.widths.count(1) >= 3 * len(method.collected)
        found.append(weights(folder))
        widths.append(method.widths)
    # Recomputing activations costs time and changes nothing; on a CPU not even a bit.
    assert widths[0] == widths[1] and found[0] == found[1]


def test_answers_carry_the_version_of_the_weights_that_wrote_them(
    models: Checkpoints, tmp_path: Path
) -> None:
    def stop(row: Any) -> None:
        if row["update"] == 4:
            signal.raise_signal(signal.SIGTERM)

    method, after = Watched(), Watched()
    settings = config(models.student, tmp_path, **{"teacher": models.teacher, "train.minibatches": 2})
    with pytest.raises(SystemExit):
        run(settings, method, stop)
    run(settings, after, resume=True)
    versions = [batch.version.unique().tolist() for batch in [*method.collected, *after.collected]]
    assert versions == [[0], [2], [4], [6]]


# -- 14 -----------------------------------------------------------------------------------------------------------------


def test_an_answer_depends_on_run_step_prompt_and_sample_alone(models: Checkpoints, tmp_path: Path) -> None:
    """The first batch of a run, asked for in other sizes and written in other rows, holds the same answers."""

    def answers(name: str, seed: int = 0, samples: int = 2, **changes: Any) -> dict[str, list[list[int]]]:
        method = Watched(samples=samples)
        changes = {"teacher": models.teacher, "train.steps": 1, "seed": seed, **changes}
        run(config(models.student, tmp_path / name, **changes), method)
        written: dict[str, list[list[int]]] = {}
        for prompt, ids in zip(
            method.collected[0].prompts, method.collected[0].response.tolist(), strict=True
        ):
            written.setdefault(prompt.id, []).append(ids)
        return written

    whole = answers("whole", **{"train.prompts_per_step": 4})
    few = answers("few", **{"train.prompts_per_step": 2, "rollout.max_rows": 1})
    assert few == {name: whole[name] for name in few} and len(few) == 2
    more = answers("more", samples=3)
    assert {name: ids[:2] for name, ids in more.items()} == whole
    for ids in more.values():
        assert len({tuple(answer) for answer in ids}) == 3
    other = answers("other", seed=1, **{"data.shuffle": False})
    base = answers("base", **{"data.shuffle": False})
    assert list(other.values()) != list(base.values())
