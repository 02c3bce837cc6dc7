"""The local engine: the right log-probs for every architecture, and text that depends on nothing but its seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rooms_rollout import EOS, MODELS, SHAPE, V, plain_logp, policy, prompts, text
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from surpass.models.policy import Lora, Policy, add_lora
from surpass.records import Finish, Ragged
from surpass.rollout.engine import Completions, Sampling
from surpass.rollout.local import LocalEngine

# float32 sums of a few dozen terms in another order, through four layers, on logits of size about 10.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def seeds(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count)


def same_text(one: Completions, other: Completions) -> None:
    assert one.response.tolist() == other.response.tolist()
    assert one.finish.tolist() == other.finish.tolist()
    torch.testing.assert_close(one.logp, other.logp, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_logp_is_that_of_a_plain_forward(name: str) -> None:
    """Ragged prompts, some beyond the sliding window, responses that cross it, rows refilled and compacted."""
    writer, prompt_ids, sampling = policy(name), prompts(7), Sampling(max_new_tokens=12)
    out = LocalEngine(writer, max_rows=5).generate(prompt_ids, 3, sampling, seeds(21))
    assert len(out.response) == 21
    assert len(set(out.response.lengths.tolist())) > 2, "all of one length: nothing was refilled unevenly"
    torch.testing.assert_close(out.logp, plain_logp(writer, prompt_ids, 3, out, sampling), **CLOSE)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-sliding", "gemma2"])
def test_text_depends_on_the_seed_and_not_on_the_batch(name: str) -> None:
    writer, prompt_ids, sampling = policy(name), prompts(9), Sampling(max_new_tokens=10)
    n, drawn = 3, seeds(27, first=100)
    whole = LocalEngine(writer, max_rows=64).generate(prompt_ids, n, sampling, drawn)
    for rows in (1, 2, 5):
        same_text(whole, LocalEngine(writer, max_rows=rows).generate(prompt_ids, n, sampling, drawn))
    same_text(whole, LocalEngine(writer, prefill_tokens=8).generate(prompt_ids, n, sampling, drawn))
    same_text(whole, LocalEngine(writer, max_tokens=60).generate(prompt_ids, n, sampling, drawn))
    alone = LocalEngine(writer).generate(prompt_ids.select(torch.tensor([4])), n, sampling, drawn[12:15])
    assert alone.response.tolist() == whole.response.tolist()[12:15]
    other = LocalEngine(writer).generate(prompt_ids, n, sampling, drawn + 1000)
    assert other.response.tolist() != whole.response.tolist()


def test_samples_of_a_prompt_lie_together_and_differ() -> None:
    prompt_ids = prompts(3)
    out = LocalEngine(policy(), max_rows=4).generate(prompt_ids, 4, Sampling(max_new_tokens=8), seeds(12))
    texts = out.response.tolist()
    assert all(len({tuple(text) for text in texts[4 * i : 4 * i + 4]}) > 1 for i in range(3))
    same_seed = torch.tensor([7, 7, 7, 7])
    one = LocalEngine(policy()).generate(
        prompt_ids.select(torch.tensor([1])), 4, Sampling(max_new_tokens=8), same_seed
    )
    assert len({tuple(text) for text in one.response.tolist()}) == 1


def test_a_group_is_read_once_however_its_rows_are_admitted() -> None:
    writer, prompt_ids = policy(), prompts(4)
    read: list[int] = []
    engine = LocalEngine(writer, max_rows=3)
    body = writer.causal_lm.base_model
    hook = body.register_forward_pre_hook(
        lambda _, args, kwargs: (
            read.append(len(kwargs["input_ids"])) if "attention_mask" not in kwargs else None
        ),
        with_kwargs=True,
    )
    engine.generate(prompt_ids, 5, Sampling(max_new_tokens=6), seeds(20))
    hook.remove()
    assert sum(read) == 4


def test_no_dead_row_is_decoded_for_long() -> None:
    """The batch shrinks with the sequences that still write: at most an eighth of it is idle."""
    writer, prompt_ids = policy(), prompts(16)
    decoded: list[int] = []
    engine = LocalEngine(writer, max_rows=64)
    hook = writer.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (
            decoded.append(len(kwargs["input_ids"])) if "attention_mask" in kwargs else None
        ),
        with_kwargs=True,
    )
    out = engine.generate(prompt_ids, 4, Sampling(max_new_tokens=40), seeds(64))
    hook.remove()
    lengths = out.response.lengths
    # Step t reads the t-th token of those that write on: the first token comes from the prompt itself.
    needed = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    assert len(decoded) == len(needed)
    assert all(need <= rows <= need + rows // 8 for rows, need in zip(decoded, needed))
    assert decoded[-1] < decoded[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=8, temperature=0.7),
        Sampling(max_new_tokens=8, top_k=3),
        Sampling(max_new_tokens=8, top_p=0.8, temperature=1.3),
        Sampling(max_new_tokens=8, min_p=0.2),
        Sampling(max_new_tokens=8, min_new_tokens=5, top_k=6),
    ],
)
def test_logp_is_under_the_law_that_sampled(sampling: Sampling) -> None:
    writer, prompt_ids = policy(), prompts(6)
    out = LocalEngine(writer, max_rows=8).generate(prompt_ids, 4, sampling, seeds(24))
    assert out.logp.dtype == torch.float32
    # A token on the edge of the cut would differ by more; with these seeds there is none.
    torch.testing.assert_close(out.logp, plain_logp(writer, prompt_ids, 4, out, sampling), **CLOSE)


def test_sampled_frequencies_are_those_of_the_model() -> None:
    """First tokens of many samples of one prompt against the model's distribution: chi-square at 1e-4."""
    writer, count = policy(), 20_000
    prompt_ids = Ragged.from_list([[3, 1, 4]])
    out = LocalEngine(writer, max_rows=4096).generate(
        prompt_ids, count, Sampling(max_new_tokens=1), seeds(count)
    )
    observed = torch.bincount(out.response.values, minlength=V).double()
    with torch.no_grad():
        expected = (
            writer.causal_lm(input_ids=prompt_ids.values.unsqueeze(0)).logits[0, -1].double().softmax(-1)
            * count
        )
    large = expected > 5
    rest_observed, rest_expected = observed[~large].sum(), expected[~large].sum()
    statistic = ((observed - expected)[large] ** 2 / expected[large]).sum()
    statistic += (rest_observed - rest_expected) ** 2 / rest_expected.clamp(min=1.0)
    # The seeds are fixed, so this either holds or not. 1e-4 quantile for 23 degrees of freedom: 55.
    assert int(large.sum()) > 5
    assert float(statistic) < 55


def test_greedy_takes_the_most_likely_token_and_records_a_certain_law() -> None:
    writer, prompt_ids = policy(), prompts(5)
    out = LocalEngine(writer, max_rows=3).generate(
        prompt_ids, 2, Sampling(max_new_tokens=6, temperature=0), seeds(10)
    )
    assert torch.equal(out.logp, torch.zeros(len(out.response.values)))
    for i, response in enumerate(out.response.tolist()):
        ids = torch.cat([prompt_ids[i // 2], torch.tensor(response)])
        with torch.no_grad():
            best = writer.causal_lm(input_ids=ids.unsqueeze(0)).logits[0].argmax(-1)
        assert best[len(prompt_ids[i // 2]) - 1 : -1].tolist() == response


def test_eos_is_part_of_the_response_although_it_is_the_padding_token() -> None:
    writer, prompt_ids = policy(), prompts(16)
    assert writer.tokenizer.pad_token_id == writer.tokenizer.eos_token_id == EOS
    # EOS in the prompt (a chat template writes it) is text like any other.
    prompt_ids = Ragged.from_list([[EOS, *p, EOS, 2] for p in prompt_ids.tolist()])
    out = LocalEngine(writer, max_rows=8).generate(prompt_ids, 4, Sampling(max_new_tokens=9), seeds(64))
    for ids, finish in zip(out.response.tolist(), out.finish.tolist()):
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) == (finish == Finish.EOS)
        assert finish == Finish.EOS or (finish == Finish.LENGTH and len(ids) == 9)
    assert set(out.finish.tolist()) == {int(Finish.EOS), int(Finish.LENGTH)}


def test_every_eos_of_the_generation_configuration_ends() -> None:
    writer = policy()
    writer.causal_lm.generation_config.eos_token_id = [EOS, 4, 5]  # type: ignore[union-attr]
    out = LocalEngine(writer).generate(prompts(8), 4, Sampling(max_new_tokens=20), seeds(32))
    last = {
        ids[-1] for ids, finish in zip(out.response.tolist(), out.finish.tolist()) if finish == Finish.EOS
    }
    assert last == {EOS, 4, 5}
    assert not any({EOS, 4, 5} & set(ids[:-1]) for ids in out.response.tolist())


def test_min_new_tokens_holds_eos_and_stop_strings_back() -> None:
    sampling = Sampling(max_new_tokens=12, min_new_tokens=6, stop=("a", "b", "c"))
    out = LocalEngine(policy(), max_rows=8).generate(prompts(16), 4, sampling, seeds(64))
    lengths = out.response.lengths
    assert int(lengths.min()) == 6
    assert all(EOS not in ids[:5] for ids in out.response.tolist())
    assert {int(Finish.EOS), int(Finish.STOP)} <= set(out.finish.tolist())


def test_a_stop_string_ends_the_response_and_leaves_its_tokens() -> None:
    writer, prompt_ids = policy(), prompts(16)
    drawn = seeds(64)
    free = LocalEngine(writer).generate(prompt_ids, 4, Sampling(max_new_tokens=12), drawn)
    texts = [text(writer, ids) for ids in free.response.tolist()]
    pair = next(t[2:4] for t in texts if len(t) > 5 and "." not in t[2:4])
    out = LocalEngine(writer, max_rows=5).generate(
        prompt_ids, 4, Sampling(max_new_tokens=12, stop=(pair,)), drawn
    )
    stopped = 0
    for before, ids, finish in zip(texts, out.response.tolist(), out.finish.tolist()):
        expected = before[: before.index(pair) + 2] if pair in before else before
        assert text(writer, ids) == expected
        assert (finish == Finish.STOP) == (pair in before)
        stopped += pair in before
    assert 0 < stopped < 64


def test_the_position_limit_ends_a_response() -> None:
    writer = policy()
    writer.causal_lm.config.max_position_embeddings = 16
    prompt_ids = Ragged.from_list([[1] * 15, [2] * 12, [3]])
    sampling = Sampling(max_new_tokens=10, min_new_tokens=10)
    out = LocalEngine(writer, max_rows=2).generate(prompt_ids, 2, sampling, seeds(6))
    assert out.response.lengths.tolist() == [1, 1, 4, 4, 10, 10]
    assert all(f in (Finish.LENGTH, Finish.EOS) for f in out.finish.tolist())


def test_requests_that_cannot_be_served_are_refused_in_words() -> None:
    writer = policy()
    engine = LocalEngine(writer)
    with pytest.raises(ValueError, match=r"prompt 1 has 64 tokens.*at most 64 including the response"):
        engine.generate(Ragged.from_list([[1], [1] * 64]), 1, Sampling(), seeds(2))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate(Ragged.from_list([[1], []]), 1, Sampling(), seeds(2))
    with pytest.raises(ValueError, match="one seed per answer"):
        engine.generate(Ragged.from_list([[1], [2]]), 2, Sampling(), seeds(2))
    with pytest.raises(ValueError, match="max_tokens is 8"):
        LocalEngine(writer, max_tokens=8).generate(
            Ragged.from_list([[1]]), 1, Sampling(max_new_tokens=9), seeds(1)
        )
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        LocalEngine(writer, max_rows=0)
    nothing = engine.generate(Ragged.from_list([]), 4, Sampling(), seeds(0))
    assert len(nothing.response) == 0


def test_diverged_weights_are_reported() -> None:
    writer = policy()
    engine = LocalEngine(writer)
    with torch.no_grad():
        writer.head.weight[2] = torch.nan
    with pytest.raises(FloatingPointError, match="not numbers"):
        engine.generate(prompts(2), 2, Sampling(max_new_tokens=3), seeds(4))


def test_models_without_a_plain_key_value_cache_are_refused() -> None:
    tokenizer = policy().tokenizer
    mamba = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="local engine"):
        LocalEngine(Policy(mamba, tokenizer, "mamba"))
    hybrid = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2,
            linear_key_head_dim=4, linear_value_head_dim=4, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=8, shared_expert_intermediate_size=8,
            layer_types=["linear_attention", "full_attention"],
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers of type linear_attention"):
        LocalEngine(Policy(hybrid, tokenizer, "hybrid"))


def test_training_mode_comes_back_and_gradients_do_not_leak() -> None:
    writer = policy()
    writer.model.train()
    writer.causal_lm.gradient_checkpointing_enable()
    writer.causal_lm.base_model.get_submodule("layers.1").eval()
    before = [module.training for module in writer.model.modules()]
    calls: list[int] = []
    hook = writer.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine = LocalEngine(writer)
    calls.clear()
    prompt_ids = Ragged.from_list([[1, 2, 3, 4, 5, 6]])
    out = engine.generate(prompt_ids, 2, Sampling(max_new_tokens=5, min_new_tokens=5), seeds(2))
    hook.remove()
    assert calls == [6, 1, 1, 1, 1], "the prompt is read once and the cache serves every later step"
    assert [module.training for module in writer.model.modules()] == before
    assert not out.logp.requires_grad
    writer.causal_lm(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in writer.model.parameters())


def test_rotary_angles_that_change_with_the_length_are_kept_apart() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0],
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval()
    writer, prompt_ids = Policy(model, policy().tokenizer, "longrope"), prompts(4, longest=8)
    engine, sampling = LocalEngine(writer), Sampling(max_new_tokens=8)
    out = engine.generate(prompt_ids, 2, sampling, seeds(8))
    torch.testing.assert_close(out.logp, plain_logp(writer, prompt_ids, 2, out, sampling), **CLOSE)
    with pytest.raises(ValueError, match="rotary angles beyond 16"):
        engine.generate(prompt_ids, 2, Sampling(max_new_tokens=12), seeds(8))


def test_nothing_of_the_model_stays_in_inference_mode() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "max_position_embeddings": 8}, rope_parameters=rope)
    ).eval()
    model.config.max_position_embeddings = 64
    writer = Policy(model, policy().tokenizer, "dynamic")
    out = LocalEngine(writer).generate(Ragged.from_list([[1] * 6]), 2, Sampling(max_new_tokens=8), seeds(2))
    assert not any(buffer.is_inference() for buffer in model.buffers())
    columns = (out.response.values, out.response.offsets, out.logp, out.finish, out.version)
    assert not any(column.is_inference() for column in columns)


def test_new_weights_are_used_and_counted() -> None:
    writer, prompt_ids, sampling = policy(), prompts(4), Sampling(max_new_tokens=6)
    engine = LocalEngine(writer)
    first = engine.generate(prompt_ids, 2, sampling, seeds(8))
    with torch.no_grad():
        for parameter in writer.model.parameters():
            parameter.mul_(1.3)
    engine.update(5)
    second = engine.generate(prompt_ids, 2, sampling, seeds(8))
    assert first.version.tolist() == [0] * 8
    assert second.version.tolist() == [5] * 8
    torch.testing.assert_close(second.logp, plain_logp(writer, prompt_ids, 2, second, sampling), **CLOSE)
    assert first.response.tolist() != second.response.tolist()


def test_an_adapter_writes() -> None:
    writer = add_lora(policy(), Lora(rank=2))
    with torch.no_grad():
        for name, parameter in writer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    prompt_ids, sampling = prompts(4), Sampling(max_new_tokens=6)
    out = LocalEngine(writer).generate(prompt_ids, 2, sampling, seeds(8))
    torch.testing.assert_close(out.logp, plain_logp(writer, prompt_ids, 2, out, sampling), **CLOSE)


def test_bfloat16_writes_under_its_own_law() -> None:
    writer = policy()
    writer.model.bfloat16()
    prompt_ids, sampling = prompts(4), Sampling(max_new_tokens=6)
    out = LocalEngine(writer).generate(prompt_ids, 2, sampling, seeds(8))
    expected = plain_logp(writer, prompt_ids, 2, out, sampling)
    # bfloat16 keeps 8 bits: relative errors of 2^-8 per layer on logits of size about 10.
    torch.testing.assert_close(out.logp, expected, rtol=0.1, atol=0.3)
    assert out.logp.dtype == torch.float32


def test_progress_counts_every_answer_once() -> None:
    seen: list[tuple[int, int]] = []
    LocalEngine(policy(), max_rows=3).generate(
        prompts(5), 2, Sampling(max_new_tokens=6), seeds(10), lambda done, total: seen.append((done, total))
    )
    assert [total for _, total in seen] == [10] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (10, 10)
