"""Reward functions: the ecosystem's signature, columns, async, and errors in words."""

import asyncio
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surpass.judge.functions import load_function
from surpass.judge.rewards import RewardError, call_reward, columns_of
from surpass.judge.shaping import format_reward, overlong_reward, soft_overlong
from surpass.records import Prompt

CHAT = Prompt(
    id="c",
    messages=({"role": "user", "content": "q"},),
    answer="7",
    domain="math",
    privileged={"solution": "s"},
    columns={"level": 3},
)
TEXT = Prompt(id="t", messages="2+2=", answer="4", columns={"source": "x"})


def call(function, completions=("one", "two"), prompts=(CHAT, TEXT), **columns):
    return call_reward("mine", function, prompts, completions, {**columns_of(prompts), **columns})


def test_everything_arrives_as_lists():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, None]

    assert call(reward) == [1.0, None]
    assert seen["prompts"] == [[{"role": "user", "content": "q"}], "2+2="]
    assert seen["completions"] == [[{"role": "assistant", "content": "one"}], "two"]
    assert seen["answer"] == ["7", "4"]
    assert seen["level"] == [3, None]
    assert seen["source"] == [None, "x"]
    assert seen["solution"] == ["s", None]
    assert seen["domain"] == ["math", "default"]
    assert seen["prompt_id"] == ["c", "t"]


def test_functions_may_take_only_what_they_read():
    assert call(lambda answer: [float(a) for a in answer]) == [7.0, 4.0]
    with pytest.raises(RewardError, match=r"'mine' needs \['gold'\], and there are only \['answer'"):
        call(lambda completions, gold: [0, 0])


def test_async_functions_run_with_and_without_a_running_loop():
    async def reward(completions, **columns):
        await asyncio.sleep(0)
        return [float(len(completions))] * 2

    async def inside():
        return call(reward)

    assert call(reward) == asyncio.run(inside()) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        (1.0, "returned float; expected a list of 2"),
        ([1.0, math.nan], "returned nan for prompt 't', completion 'two'"),
        ([math.inf, 1.0], "returned inf for prompt 'c'"),
        ([1.0, "good"], "returned 'good' for prompt 't'"),
    ],
)
def test_wrong_results(values, message):
    with pytest.raises(RewardError, match=message):
        call(lambda completions: values)


def test_a_raising_function_is_traced_to_its_completion():
    def reward(completions, **columns):
        return [1.0 / (completion != "two") for completion in completions]

    with pytest.raises(RewardError, match=r"'mine' raised ZeroDivisionError on prompt 't', completion 'two'"):
        call(reward)

    def only_together(completions):
        raise_if_many = {1: [1.0]}
        return raise_if_many[len(completions)]

    with pytest.raises(RewardError, match="'mine' raised KeyError: 2"):
        call(only_together)


def test_functions_by_name(tmp_path):
    file = Path(__file__).parent / "misbehaving.py"
    assert load_function(f"{file}:rewards")([], ["a"]) == [0.5]
    assert load_function("math:sqrt") is math.sqrt
    with pytest.raises(ValueError, match=r"has no function 'reward'; it has \[.*'rewards'"):
        load_function(f"{file}:reward")
    with pytest.raises(ValueError, match="there is no file"):
        load_function(f"{tmp_path / 'a.py'}:f")
    with pytest.raises(ValueError, match="cannot import 'nowhere_at_all:f'"):
        load_function("nowhere_at_all:f")
    with pytest.raises(ValueError, match="expected 'module:function'"):
        load_function("just_a_name")


def test_soft_overlong_closed_form():
    lengths = torch.tensor([0, 80, 81, 90, 100, 140])
    expected = torch.tensor([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
    torch.testing.assert_close(soft_overlong(lengths, 100, 20), expected)
    with pytest.raises(ValueError, match="0 < buffer <= limit"):
        soft_overlong(lengths, 10, 20)
    function = overlong_reward(100, 20)
    assert call(function, completion_ids=[[0] * 90, [0]]) == [-0.5, 0.0]
    with pytest.raises(RewardError, match=r"needs \['completion_ids'\]"):
        call(function)


@given(st.lists(st.integers(0, 200), min_size=2, max_size=9), st.integers(1, 100))
def test_soft_overlong_never_rewards_length(lengths, buffer):
    values = soft_overlong(torch.tensor(sorted(lengths)), 100, buffer)
    assert bool((values.diff() <= 0).all())
    assert bool(((values >= -1) & (values <= 0)).all())


def test_format_matches_the_whole_completion():
    function = format_reward(r"<think>.*</think>.+")
    texts = ["<think>a\nb</think> 7 ", "7 <think></think>"]
    assert call(function, texts) == [1.0, 0.0]
    with pytest.raises(ValueError, match="not a regular expression"):
        format_reward("(")
