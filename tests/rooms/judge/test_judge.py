"""The judge: weights, what does not apply, and failures that are counted and never taken as wrong."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surpass.judge.build import build_judge
from surpass.judge.judge import Component, Judge, VerifierError
from surpass.judge.verifiers import verifier_named
from surpass.records import Prompt

MISBEHAVING = f"{Path(__file__).parent / 'misbehaving.py'}"
PROMPTS = [Prompt(id=str(i), messages="q", answer="1") for i in range(4)]
VALUES = st.lists(st.none() | st.floats(-5, 5, width=32), min_size=4, max_size=4)


def returning(values):
    return lambda completions: values


@given(VALUES, VALUES, st.floats(-2, 2, width=32))
def test_reward_is_the_weighted_sum_of_what_applies(first, second, weight):
    judge = Judge([Component("a", returning(first)), Component("b", returning(second), weight)])
    verdict = judge(PROMPTS, ["x"] * 4)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        parts = [v for v in (a, None if b is None else weight * b) if v is not None]
        if parts:
            # Sums of two float32 numbers of size at most 15: absolute error below 2e-6.
            assert float(verdict.reward[i]) == pytest.approx(sum(parts), abs=2e-6)
        else:
            assert math.isnan(verdict.reward[i])
        assert math.isnan(verdict.components["a"][i]) == (a is None)
    assert verdict.reward.dtype == torch.float32


def test_components_speak_on_their_domains_only():
    prompts = [
        Prompt(id="m", messages="q", answer="1", domain="math"),
        Prompt(id="c", messages="q", answer="B", domain="mcq"),
    ]
    seen = []

    def bonus(completions, domain):
        seen.extend(domain)
        return [1.0] * len(completions)

    judge = Judge(
        [
            Component("exact", verifier_named("exact"), domains=frozenset({"math"})),
            Component("choice", verifier_named("choice"), domains=frozenset({"mcq"})),
            Component("bonus", bonus, 0.5, frozenset({"mcq"})),
        ]
    )
    verdict = judge(prompts, ["1", "Answer: B"])
    assert verdict.reward.tolist() == [1.0, 1.5]
    assert seen == ["mcq"]
    nan = math.nan
    torch.testing.assert_close(verdict.components["choice"], torch.tensor([nan, 1.0]), equal_nan=True)
    assert judge(prompts[:1], ["1"]).reward.tolist() == [1.0]


FAILING = ["1", "hang", "raise", "2"]


def failing_judge(on_failure):
    return build_judge(
        PROMPTS,
        {"default": f"{MISBEHAVING}:verify"},
        {f"{MISBEHAVING}:rewards": 1.0},
        on_failure=on_failure,
        time_limit=1.0,
    )


def test_failures_are_skipped_whatever_other_components_say():
    with failing_judge("skip") as judge:
        verdict = judge(PROMPTS, FAILING)
    nan = math.nan
    torch.testing.assert_close(verdict.reward, torch.tensor([1.5, nan, nan, 0.5]), equal_nan=True)
    torch.testing.assert_close(
        verdict.components["verify"], torch.tensor([1.0, nan, nan, 0.0]), equal_nan=True
    )
    assert verdict.components["rewards"].tolist() == [0.5] * 4
    assert verdict.metrics == {"judge/verify/timeouts": 1.0, "judge/verify/errors": 1.0}
    assert "KeyError: 'no such thing'" in verdict.failures["verify"]


def test_failures_can_be_zero_or_stop_the_run():
    with failing_judge("zero") as judge:
        verdict = judge(PROMPTS, FAILING)
    assert verdict.reward.tolist() == [1.5, 0.5, 0.5, 0.5]
    assert verdict.metrics["judge/verify/timeouts"] == 1.0
    with (
        failing_judge("raise") as judge,
        pytest.raises(VerifierError, match=r"'verify' failed on prompt '2' \(error\)"),
    ):
        judge(PROMPTS[:3], ["1", "1", "raise"])


def test_failures_here_are_counted_like_those_in_workers():
    prompts = [Prompt(id="p", messages="q", answer="2"), Prompt(id="r", messages="q", answer="A")]
    verdict = Judge([Component("choice", verifier_named("choice"))])(prompts, ["Answer: A"] * 2)
    assert math.isnan(verdict.reward[0])
    assert verdict.reward[1] == 1.0
    assert verdict.metrics == {"judge/choice/timeouts": 0.0, "judge/choice/errors": 1.0}
    assert "letter A-E" in verdict.failures["choice"]


def test_math_runs_in_workers_with_our_limit():
    with build_judge(PROMPTS, {"default": "math"}, time_limit=30.0) as judge:
        judge.start()
        verdict = judge(PROMPTS, [r"\boxed{1}", r"\boxed{\frac22}", "1 apple", r"\boxed{2}"])
    assert verdict.reward.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert verdict.metrics == {"judge/math/timeouts": 0.0, "judge/math/errors": 0.0}


def test_a_prompt_without_gold_answer_is_an_error_not_a_failure():
    judge = Judge([Component("exact", verifier_named("exact"))], on_failure="zero")
    with pytest.raises(ValueError, match="prompt 'p' has none; add an `answer` column"):
        judge([Prompt(id="p", messages="q")], ["1"])


def test_building_from_names(no_sandbox: None):
    prompts = [Prompt(id=d, messages="q", domain=d, answer="1") for d in ("a", "b", "c")]
    judge = build_judge(prompts, {"a": "math", "b": "math", "c": "exact"})
    assert [(c.name, c.domains) for c in judge.components] == [("math", {"a", "b"}), ("exact", {"c"})]
    with pytest.raises(ValueError, match=r"no verifier for prompts of domain \['b', 'c'\]"):
        build_judge(prompts, {"a": "math"})
    with pytest.raises(ValueError, match="no sandbox verifier"):
        build_judge(prompts, {"default": "code"})


def test_unusable_judges():
    part = Component("a", returning([0.0]))
    with pytest.raises(ValueError, match=r"found \['a', 'a'\]"):
        Judge([part, part])
    with pytest.raises(ValueError, match="found \\[\\]"):
        Judge([])
    with pytest.raises(ValueError, match="skip, zero or raise; found 'ignore'"):
        Judge([part], on_failure="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be finite"):
        Judge([Component("a", returning([0.0]), math.nan)])
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        Judge([part])(PROMPTS[:2], ["x"])
