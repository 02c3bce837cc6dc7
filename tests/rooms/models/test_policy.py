import pytest
import torch
from rooms_models import KINDS, V, tiny
from torch import nn

from surpass.models.policy import Lora, Policy, add_lora, check_head, load_policy, save_policy


def logits(policy: Policy, ids: list[int]) -> torch.Tensor:
    """What the model's own forward says, `[L, V]`."""
    with torch.no_grad():
        return policy.model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def trained_adapter(policy: Policy) -> Policy:
    """peft starts an adapter as the identity; give it something to say."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_head_of_hidden_states_is_the_models_own_forward(kind):
    policy = tiny(kind)
    check_head(policy)
    ids = [3, 1, 4, 1, 5]
    with torch.no_grad():
        ours = policy.head.logits(policy.body(input_ids=torch.tensor([ids]), use_cache=False)[0])
    torch.testing.assert_close(ours, logits(policy, ids))


@pytest.mark.parametrize(("kind", "field", "value"), [("gemma2", "softcap", 0.7), ("cohere", "scale", 3.0)])
def test_head_carries_what_the_configuration_does_to_logits(kind, field, value):
    assert getattr(tiny(kind).head, field) == value


def test_head_check_fails_where_soft_capping_is_not_declared():
    policy = tiny("gemma2")
    forward = policy.causal_lm.forward
    policy.causal_lm.config.final_logit_softcapping = None

    def capped(**inputs):
        out = forward(**inputs)
        out.logits = 0.7 * torch.tanh(out.logits / 0.7)
        return out

    policy.causal_lm.forward = capped  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not output head times last hidden"):
        check_head(policy)


def test_head_check_fails_where_the_body_stops_short():
    policy = tiny("qwen3")

    class Short(Policy):
        def body(self, **inputs):
            return self.causal_lm.get_input_embeddings()(inputs["input_ids"])

    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        check_head(Short(policy.model, policy.tokenizer, policy.name))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["q_proj", "lm_head"]], ids=str)
def test_adapter_on_and_off(kind, targets):
    base = tiny(kind)
    ids = [0, 2, 5]
    before = logits(base, ids)
    policy = trained_adapter(add_lora(tiny(kind), Lora(rank=2, alpha=4, targets=targets)))
    check_head(policy)
    assert not torch.allclose(logits(policy, ids), before, atol=1e-3)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return policy.head.logits(policy.body(input_ids=torch.tensor([ids]), use_cache=False)[0])

    torch.testing.assert_close(ours(), logits(policy, ids))
    with policy.adapter(False):
        check_head(policy)
        torch.testing.assert_close(ours(), before)
    torch.testing.assert_close(ours(), logits(policy, ids))


def test_gradient_reaches_an_adapter_on_the_head_and_not_the_base():
    policy = trained_adapter(add_lora(tiny("qwen3"), Lora(rank=2, targets=["lm_head"])))
    hidden = policy.body(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)[0]
    policy.head.logits(hidden).log_softmax(-1)[:, 0].sum().backward()
    grads = {name: p.grad for name, p in policy.model.named_parameters()}
    assert all(g is None for name, g in grads.items() if "lora" not in name)
    adapter = [g for name, g in grads.items() if "lora" in name]
    assert len(adapter) == 2
    assert all(g is not None and g.abs().max() > 0 for g in adapter)


def test_rank_zero_trains_everything():
    policy = tiny("qwen3")
    assert add_lora(policy, Lora()) is policy


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(kind, tmp_path):
    policy = tiny(kind)
    save_policy(policy, tmp_path / "deep" / "model")
    attention = "eager" if kind == "gemma2" else "sdpa"  # transformers has no sdpa for gemma2
    again = load_policy(str(tmp_path / "deep" / "model"), attention=attention)
    assert list(again.causal_lm.state_dict()) == list(policy.causal_lm.state_dict())
    for name, value in policy.causal_lm.state_dict().items():
        assert torch.equal(again.causal_lm.state_dict()[name], value), name
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert torch.equal(logits(again, [1, 2, 3]), logits(policy, [1, 2, 3]))
    assert (again.vocabulary, again.max_length, again.eos_ids) == (V, 16, (V - 1,))


def test_weights_are_written_as_safetensors(tmp_path):
    save_policy(tiny("qwen3"), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_dtype_is_the_one_asked_for(tmp_path):
    save_policy(tiny("qwen3"), tmp_path)
    policy = load_policy(str(tmp_path), dtype="bfloat16")
    assert policy.dtype == torch.bfloat16
    assert policy.head.logits(torch.zeros(1, 8)).dtype == torch.float32


def test_loading_nothing_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json, safetensors and tokenizer"):
        load_policy(str(tmp_path))


def test_end_tokens_of_tokenizer_and_generation_configuration_come_once():
    policy = tiny("qwen3")
    assert policy.causal_lm.generation_config is not None
    policy.causal_lm.generation_config.eos_token_id = [4, V - 1]
    assert policy.eos_ids == (4, V - 1)


def test_padded_vocabulary_is_that_of_the_head():
    policy = tiny("qwen3", vocab_size=V + 3)
    assert policy.vocabulary == V + 3 == policy.head.vocabulary
    assert len(policy.tokenizer) == V
    assert isinstance(policy.causal_lm.get_output_embeddings(), nn.Linear)
