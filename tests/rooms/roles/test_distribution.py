import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM
from world import V, distributions, policy, prompts, rollouts, world  # pyright: ignore[reportMissingImports]

from surpass.learn import targets
from surpass.learn.divergence import Divergence, reverse_kl
from surpass.methods.run import Run
from surpass.models.policy import Policy
from surpass.records import Rollouts, Scores
from surpass.roles.distribution import blocks, log_normaliser
from surpass.roles.role import Role
from surpass.roles.scoring import Want

TEXTS = [[0, 1, 3], [2], [1, 0, 0], [3], [2, 2]]
DOMAINS = ["math", "code", "code", "math", "math"]
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def wide(seed: int, hidden: int = 12, vocabulary: int = V) -> Policy:
    """A policy of another hidden width, its vocabulary padded beyond the tokenizer's."""
    like = policy(seed)
    config = copy.deepcopy(like.config)
    config.hidden_size, config.vocab_size = hidden, vocabulary
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(Qwen3ForCausalLM(config).eval(), like.tokenizer, f"wide-{seed}")


def mixed(**policies: Policy) -> tuple[Run, Rollouts]:
    """Two domains, one teacher each, and a reference, all scored with hidden states."""
    found = {"math": policy(1), "code": wide(4), "reference": policy(2), **policies}
    roles = {domain: Role(f"teacher/{domain}", found[domain]) for domain in ("math", "code")}
    run = world(TEXTS, teachers=roles, reference=found["reference"])
    asked = [dataclasses.replace(p, domain=d) for p, d in zip(prompts(len(TEXTS)), DOMAINS)]
    batch = rollouts(run, TEXTS, asked)
    for role in ("teacher", "reference"):
        batch = run.score(batch, role, Want(hidden=True))
    return run, batch


def routed(run: Run, batch: Rollouts, vocabulary: int = V) -> torch.Tensor:
    """`[T, V]` log-probs of each token's own teacher, cut to the shared vocabulary."""
    speaks = [p.domain for p in batch.prompts]
    rows = []
    for domain, reader in run.teachers.items():
        hidden_logits = distributions(reader.policy, batch).detach()[:, :vocabulary].log_softmax(-1)
        mine = batch.response.expand(torch.tensor([d == domain for d in speaks]))
        rows.append(torch.where(mine.unsqueeze(-1), hidden_logits, torch.zeros(())))
    return torch.stack(rows).sum(0)


def test_one_block_for_each_teacher_that_speaks():
    _, batch = mixed()
    found = blocks(batch, {"teacher": 1.5, "reference": -0.5})
    assert sorted(torch.cat([b.tokens for b in found]).tolist()) == list(range(len(batch.response.values)))
    assert [[name for name, _, _ in b.terms] for b in found] == [
        ["teacher/math", "reference"],
        ["teacher/code", "reference"],
    ]
    assert [b.terms[0][1].shape[1] for b in found] == [8, 12]
    alone = blocks(batch.select(torch.tensor([1, 2])), {"teacher": 1.0})
    assert [b.terms[0][0] for b in alone] == ["teacher/code"]


def test_a_role_of_weight_zero_is_not_read():
    _, batch = mixed()
    silent = batch.with_(scores={"reference": Scores()})
    assert all(len(b.terms) == 1 for b in blocks(silent, {"teacher": 1.0, "reference": 0.0}))
    with pytest.raises(ValueError, match="role 'reference' has no hidden states on 10 of 10 tokens"):
        blocks(silent, {"teacher": 1.0, "reference": 1e-9})


def test_per_token_weights_go_with_their_tokens():
    _, batch = mixed()
    weight = torch.arange(len(batch.response.values), dtype=torch.float32)
    for block in blocks(batch, {"teacher": weight}):
        assert torch.equal(block.terms[0][2], weight[block.tokens])  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("padding", [0, 3])
def test_divergence_with_routed_teachers_of_other_widths_and_padded_vocabularies(scale, padding):
    run, batch = mixed(code=wide(4, vocabulary=V + padding))
    weights: dict[str, float | torch.Tensor] = {"teacher": scale, "reference": 1 - scale}
    found = run.divergence(batch, run.student_hidden(batch), weights, Divergence("reverse_kl"))
    teacher = routed(run, batch)
    assert run.reference is not None
    reference = distributions(run.reference.policy, batch).detach()
    target = targets.log_linear([teacher, reference], [scale, 1 - scale])
    student = distributions(run.student, batch)
    torch.testing.assert_close(found.value, reverse_kl(student, target), **SAME)
    code = batch.response.expand(torch.tensor([d == "code" for d in DOMAINS]))
    dropped = 1 - distributions(run.teachers["code"].policy, batch).detach().exp()[:, :V].sum(-1)
    torch.testing.assert_close(found.target_dropped, torch.where(code, dropped, torch.zeros(())), **SAME)
    assert bool((found.target_dropped > 1e-3).any()) == (padding > 0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_log_normaliser_of_routed_teachers(scale, chunk):
    run, batch = mixed(code=wide(4, vocabulary=V + 3))
    weights: dict[str, float | torch.Tensor] = {"teacher": scale, "reference": 1 - scale}
    found = log_normaliser(batch, weights, lambda role: run.role(role).head, 1.0, chunk)
    assert run.reference is not None
    reference = distributions(run.reference.policy, batch).detach()
    expected = torch.logsumexp(scale * routed(run, batch) + (1 - scale) * reference, -1)
    torch.testing.assert_close(found, expected, **SAME)
    if scale == 1.0:
        assert not bool(found.any())


def test_blocks_survive_a_selection_of_rows():
    run, batch = mixed()
    weights: dict[str, float | torch.Tensor] = {"teacher": 1.5, "reference": -0.5}
    rows = torch.tensor([4, 1, 0])
    whole = run.divergence(batch, run.student_hidden(batch), weights, Divergence("reverse_kl")).value
    part = batch.select(rows)
    found = run.divergence(part, run.student_hidden(part), weights, Divergence("reverse_kl")).value
    torch.testing.assert_close(found, whole[batch.response.tokens_of(rows)], **SAME)


def test_a_larger_student_vocabulary_is_cut_too():
    student = wide(0, vocabulary=V + 2)
    run = world(TEXTS, student=student, teacher=policy(1))
    batch = run.score(rollouts(run, TEXTS), "teacher", Want(hidden=True))
    found = run.divergence(batch, run.student_hidden(batch), {"teacher": 1.0}, Divergence("reverse_kl"))
    mine = distributions(student, batch)
    cut = mine[:, :V].log_softmax(-1)
    torch.testing.assert_close(found.value, reverse_kl(cut, distributions(policy(1), batch).detach()), **SAME)
    torch.testing.assert_close(found.student_dropped, mine.detach().exp()[:, V:].sum(-1), **SAME)
