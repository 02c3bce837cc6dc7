"""Tiles against the direct formula in float64. Tolerances: float32 rounding of sums over V <= 23 terms,
logits below 20.
"""

import pytest
import torch
from rooms_learn import close

from surpass.learn.divergence import Divergence, entropy
from surpass.learn.head import Head
from surpass.learn.targets import log_linear
from surpass.learn.vocabulary import TargetTerm, log_linear_divergence, support_logp, token_logp, top_k

T, D, V = 13, 5, 17
FLOAT32 = {"rtol": 1e-4, "atol": 5e-6}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.5},
    "all": {"bias": True, "softcap": 2.0, "scale": 1.5},
}


def make(seed, tokens=T, width=D, vocabulary=V, bias=False, softcap=None, scale=1.0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_(grad)
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_(grad)
    offset = torch.randn(vocabulary, generator=generator).requires_grad_(grad) if bias else None
    return hidden, Head(weight, offset, softcap, scale)


def naive_logits(hidden, head, temperature):
    z = hidden.double() @ head.weight.double().T
    z = z if head.bias is None else z + head.bias.double()
    z = z * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


def leaves(hidden, head):
    return [hidden, head.weight] + ([] if head.bias is None else [head.bias])


def same_gradients(found, expected, inputs):
    weights = torch.randn(len(found), generator=torch.Generator().manual_seed(9))
    got = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
    want = torch.autograd.grad((expected * weights.double()).sum(), inputs, retain_graph=True)
    for a, b in zip(got, want):
        close(a, b, **FLOAT32)


@pytest.mark.parametrize("head_kind", HEADS)
@pytest.mark.parametrize("chunk", [None, 1, 4, T])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logp(head_kind, chunk, temperature):
    hidden, head = make(0, **HEADS[head_kind])
    ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    found = token_logp(hidden, head, ids, temperature, chunk, entropy_gradient=True)
    logp = naive_logits(hidden, head, temperature).log_softmax(-1)
    close(found.logp, logp.gather(-1, ids[:, None])[:, 0].float(), **FLOAT32)
    close(found.entropy, entropy(logp).float(), **FLOAT32)
    expected = logp.gather(-1, ids[:, None])[:, 0] + 0.3 * entropy(logp)
    same_gradients(found.logp + 0.3 * found.entropy, expected, leaves(hidden, head))
    plain = token_logp(hidden, head, ids, temperature, chunk)
    assert not plain.entropy.requires_grad
    same_gradients(plain.logp, logp.gather(-1, ids[:, None])[:, 0], leaves(hidden, head))


@pytest.mark.parametrize("chunk", [None, 3])
def test_support_and_top_k(chunk):
    hidden, head = make(0)
    logp = naive_logits(hidden, head, 0.9).log_softmax(-1)
    ids, best = top_k(hidden, head, 4, 0.9, chunk)
    assert torch.equal(ids, logp.topk(4).indices)
    close(best, logp.topk(4).values.float(), **FLOAT32)
    assert not best.requires_grad
    found = support_logp(hidden, head, ids, 0.9, chunk)
    close(found, best, **FLOAT32)
    same_gradients(found.sum(-1), logp.gather(-1, ids).sum(-1), leaves(hidden, head))
    with pytest.raises(ValueError, match="vocabulary of 17"):
        top_k(hidden, head, 18)


@pytest.mark.parametrize(
    "divergence",
    [
        Divergence("forward_kl"),
        Divergence("reverse_kl"),
        Divergence("jsd", 0.3),
        Divergence("skew_forward_kl", 0.1),
        Divergence("mixed_kl", 0.25),
    ],
    ids=lambda d: d.kind,
)
@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("vocabularies", [(17, 17, 17), (23, 17, 19), (17, 23, 17)])
def test_log_linear_divergence(divergence, chunk, vocabularies):
    student, student_head = make(0, vocabulary=vocabularies[0], **HEADS["all"])
    teacher, teacher_head = make(1, vocabulary=vocabularies[1], width=7)
    reference, reference_head = make(2, vocabulary=vocabularies[2], softcap=4.0)
    scale = torch.linspace(0.5, 2.0, T)
    scale[4] = 1.0
    terms = [
        TargetTerm(teacher, teacher_head, scale),
        TargetTerm(reference, reference_head, 1 - scale),
    ]
    found = log_linear_divergence(student, student_head, terms, divergence, 0.8, chunk)
    shared = min(vocabularies)
    full = [
        naive_logits(h, head, 0.8)
        for h, head in ((student, student_head), (teacher, teacher_head), (reference, reference_head))
    ]
    logps = [z[:, :shared].log_softmax(-1) for z in full]
    target = log_linear(logps[1:], [scale.double(), 1 - scale.double()]).detach()
    expected = divergence(logps[0], target)
    close(found.value, expected.float(), **FLOAT32)
    close(found.student_entropy, entropy(logps[0]).float(), **FLOAT32)
    close(found.target_entropy, entropy(target).float(), **FLOAT32)
    assert torch.equal(found.top1_agreement, (logps[0].argmax(-1) == target.argmax(-1)).float())
    dropped = [z.softmax(-1)[:, shared:].sum(-1) for z in full]
    dropped[2][4] = 0.0  # the reference has weight 0 there
    close(found.student_dropped, dropped[0].float(), **FLOAT32)
    close(found.target_dropped, torch.maximum(dropped[1], dropped[2]).float(), **FLOAT32)
    assert not any(column.requires_grad for column in found[1:])
    same_gradients(found.value, expected, leaves(student, student_head))
    again = log_linear_divergence(student, student_head, terms, divergence, 0.8, chunk).value.sum()
    roles = torch.autograd.grad(again, [teacher, teacher_head.weight, reference], allow_unused=True)
    assert roles == (None, None, None)


def test_a_role_of_weight_zero_is_never_read():
    student, student_head = make(0)
    teacher, teacher_head = make(1, grad=False)
    poison, poison_head = torch.full((T, 3), torch.nan), Head(torch.full((V - 4, 3), torch.nan))
    arguments = (student, student_head)
    reverse = Divergence("reverse_kl")
    plain = log_linear_divergence(*arguments, [TargetTerm(teacher, teacher_head, 1.0)], reverse)
    terms = [TargetTerm(teacher, teacher_head, 1.0), TargetTerm(poison, poison_head, 0.0)]
    found = log_linear_divergence(*arguments, terms, reverse)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))
    nan_rows, (_, reference_head) = teacher.clone(), make(2, grad=False)
    nan_rows[::2] = torch.nan
    weight = torch.zeros(T)
    weight[1::2] = -0.25
    terms = [TargetTerm(teacher, teacher_head, 1 - weight), TargetTerm(nan_rows, reference_head, weight)]
    mixed = log_linear_divergence(*arguments, terms, reverse)
    assert torch.equal(mixed.value[::2], plain.value[::2])
    at_hidden, at_weight = torch.autograd.grad(mixed.value.sum(), leaves(student, student_head))
    assert at_hidden.isfinite().all()
    assert at_weight.isfinite().all()


def test_extreme_logits_and_no_tokens():
    student, student_head = make(0)
    teacher, teacher_head = make(1, grad=False)
    sharp = [TargetTerm(teacher * 1e4, teacher_head, 1.25), TargetTerm(-teacher * 1e4, teacher_head, -0.25)]
    found = log_linear_divergence(student * 1e4, student_head, sharp, Divergence("reverse_kl"))
    assert all(column.isfinite().all() for column in found)
    assert torch.autograd.grad(found.value.sum(), student)[0].isfinite().all()
    none = [TargetTerm(teacher[:0], teacher_head, 1.0)]
    empty = log_linear_divergence(student[:0], student_head, none, Divergence("forward_kl"))
    assert empty.value.shape == (0,)
    assert torch.equal(torch.autograd.grad(empty.value.sum(), student_head.weight)[0], torch.zeros(V, D))
    with pytest.raises(ValueError, match="13 tokens"):
        log_linear_divergence(student, student_head, none, Divergence("forward_kl"))


def test_frozen_head_and_half_precision():
    hidden, head = make(0)
    ids = torch.arange(T)
    frozen = Head(head.weight.detach())
    (at_hidden,) = torch.autograd.grad(token_logp(hidden, frozen, ids).logp.sum(), hidden)
    (both,) = torch.autograd.grad(token_logp(hidden, head, ids).logp.sum(), hidden)
    assert torch.equal(at_hidden, both)
    low = Head(head.weight.detach().bfloat16().requires_grad_())
    low_hidden = hidden.detach().bfloat16().requires_grad_()
    found = token_logp(low_hidden, low, ids, chunk=2).logp
    assert found.dtype == torch.float32
    got = torch.autograd.grad(found.sum(), [low_hidden, low.weight])
    logp = naive_logits(low_hidden, low, 1.0).log_softmax(-1)
    want = torch.autograd.grad(logp.gather(-1, ids[:, None]).sum(), [low_hidden, low.weight])
    assert [g.dtype for g in got] == [torch.bfloat16] * 2
    for a, b in zip(got, want):
        close(a.float(), b.float(), rtol=0.05, atol=0.1)  # bfloat16 keeps 8 bits of logits of size 10


def test_no_tile_exceeds_the_budget(monkeypatch):
    import surpass.learn.vocabulary as room

    monkeypatch.setitem(room.TILE_BYTES, "cpu", 3 * V * 4)
    sizes = []
    original = Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda self, h, t=1.0: (sizes.append(len(h)), original(self, h, t))[1]
    )
    hidden, head = make(0)
    token_logp(hidden, head, torch.arange(T)).logp.sum().backward()
    assert sizes == [3, 3, 3, 3, 1] * 2
