"""Tiles, parts and hand-written derivatives against float64 autograd and finite differences.

Tolerances: float32 rounding, 6e-8 of the logits' size for log-probs, times the number of roles that add up.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms_learn import close

from surpass.learn import fused, fused_divergence
from surpass.learn.derivatives import at_logits, rule, slope_to_middle
from surpass.learn.divergence import Divergence, entropy
from surpass.learn.head import Head
from surpass.learn.targets import log_linear
from surpass.learn.vocabulary import TargetTerm, log_linear_divergence, support_logp, token_logp, top_k

KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.1),
    Divergence("rescaled_jsd", 0.3),
    Divergence("rescaled_jsd", 1.0),
    Divergence("skew_forward_kl", 0.1),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("skew_reverse_kl", 0.0),
    Divergence("mixed_kl", 0.25),
    Divergence("mixed_kl", 1.0),
]
every_kind = pytest.mark.parametrize("divergence", KINDS, ids=lambda d: f"{d.kind}-{d.parameter}")


def make(seed, tokens, vocabulary, width=5, size=1.0, **shape):
    generator = torch.Generator().manual_seed(seed)
    hidden = (size * torch.randn(tokens, width, generator=generator)).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    return hidden, Head(weight, **shape)


def reference(hidden, head, temperature=1.0):
    """Float64 log-probs, with gradient to the float32 leaves."""
    z = hidden.double() @ head.weight.double().T
    z = z if head.bias is None else z + head.bias.double()
    z = z * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return (z / temperature).log_softmax(-1)


def small_tiles(monkeypatch, tokens=4, vocabulary=64, kept_rows=4, of=130):
    monkeypatch.setitem(fused.TILE_BYTES, "cpu", 4 * tokens * vocabulary)
    monkeypatch.setitem(fused.KEPT_BYTES, "cpu", 4 * kept_rows * of)


def count_matrix_products(monkeypatch):
    """Logits made, in tile rows, by every call after this."""
    made = []
    original = fused.fill

    def counting(out, head, hidden, temperature):
        made.append(out.numel())
        return original(out, head, hidden, temperature)

    for room in (fused, fused_divergence):
        monkeypatch.setattr(room, "fill", counting)
    return made


@every_kind
def test_derivative_is_that_of_finite_differences(divergence):
    generator = torch.Generator().manual_seed(0)
    z, target = (2 * torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    target = target.log_softmax(-1)
    form, step = rule(divergence), 1e-5

    def value(z):
        return divergence(z.log_softmax(-1), target)

    expected = torch.stack([value(z + step * e) - value(z - step * e) for e in torch.eye(7).double()], -1)
    u, normaliser, scratch = target.clone(), z.logsumexp(-1), [torch.empty_like(z) for _ in range(5)]
    mean = divergence_mean = value(z)
    if form.middle is not None:
        sums = torch.zeros(2, 3, dtype=torch.float64)
        slope_to_middle(form, z.log_softmax(-1), u, False, scratch, sums)
        divergence_mean, mean = sums
    elif form.reverse:
        mean = Divergence("reverse_kl")(z.log_softmax(-1), target)
    found = at_logits(form, z.clone(), u, normaliser, torch.zeros(3).double(), mean, False, scratch)
    close(divergence_mean, value(z), rtol=1e-12, atol=1e-14)
    # central differences: step^2 = 1e-10 of a third derivative of size 10, and 1e-16 / step of rounding
    close(found, expected / (2 * step), rtol=1e-6, atol=1e-8)


@every_kind
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.sampled_from([1, 4, 5, 9]),
    vocabularies=st.tuples(*[st.sampled_from([2, 63, 64, 65, 129])] * 3),
    temperature=st.sampled_from([1.0, 0.7]),
    shaped=st.booleans(),
    extrapolation=st.sampled_from([1.0, 1.25, 0.5]),
    seed=st.integers(0, 100),
)
def test_any_sizes_against_float64(
    divergence, tokens, vocabularies, temperature, shaped, extrapolation, seed
):
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        shape = {"softcap": 3.0, "scale": 1.5} if shaped else {}
        models = [make(seed + i, tokens, v, 4 + i, **shape) for i, v in enumerate(vocabularies)]
        weights = [extrapolation, 1 - extrapolation]
        terms = [TargetTerm(*models[i + 1], w) for i, w in enumerate(weights)]
        found = log_linear_divergence(*models[0], terms, divergence, temperature)
        used = models if extrapolation != 1 else models[:2]
        shared = min(head.vocabulary for _, head in used)
        full = [reference(*model, temperature) for model in used]
        logps = [logp[:, :shared].log_softmax(-1) for logp in full]
        target = log_linear(logps[1:], weights[: len(used) - 1]).detach()
        expected = divergence(logps[0], target)
        close(found.value, expected.float(), rtol=1e-4, atol=1e-5)
        close(found.student_entropy, entropy(logps[0]).float(), rtol=1e-4, atol=1e-5)
        close(found.target_entropy, entropy(target).float(), rtol=1e-4, atol=1e-5)
        outside = [logp[:, shared:].exp().sum(-1) for logp in full]
        close(found.student_dropped, outside[0].float(), rtol=1e-4, atol=1e-6)
        close(found.target_dropped, torch.stack(outside[1:]).amax(0).float(), rtol=1e-4, atol=1e-6)
        leaves = [models[0][0], models[0][1].weight]
        got = torch.autograd.grad(found.value.mean(), leaves)
        for a, b in zip(got, torch.autograd.grad(expected.mean(), leaves)):
            close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_weight", [None, "right", "wrong"])
def test_loss_weight_changes_the_cost_alone(monkeypatch, loss_weight):
    small_tiles(monkeypatch)
    tokens, vocabulary = 9, 130
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)).requires_grad_()
    student, head = make(0, tokens, vocabulary, bias=bias)
    term = TargetTerm(*make(1, tokens, vocabulary, 7), 1.0)
    upstream = torch.linspace(-0.5, 2.0, tokens)
    known = {None: None, "right": 3 * upstream, "wrong": upstream.flip(0)}[loss_weight]
    made = count_matrix_products(monkeypatch)
    found = log_linear_divergence(student, head, [term], KINDS[1], loss_weight=known).value
    forward = sum(made)
    target = reference(term.hidden, term.head).detach()
    expected = KINDS[1](reference(student, head), target)
    for attempt in range(2):  # the second backward pass finds the head's gradient given away
        made.clear()
        got = torch.autograd.grad((upstream * found).sum(), [student, head.weight, bias], retain_graph=True)
        wanted = torch.autograd.grad(
            (upstream * expected).sum(), [student, head.weight, bias], retain_graph=True
        )
        for a, b in zip(got, wanted):
            close(a, b, rtol=1e-4, atol=1e-5)
        again = loss_weight != "right" or attempt == 1
        assert sum(made) == (2 * tokens * vocabulary if again else 0)
    assert forward == 3 * tokens * vocabulary  # student twice, target once


def test_a_frozen_head_never_makes_logits_again(monkeypatch):
    student, head = make(0, 9, 130)
    frozen = Head(head.weight.detach())
    term = TargetTerm(*make(1, 9, 130, 7), 1.0)
    upstream = torch.linspace(-0.5, 2.0, 9)
    found = log_linear_divergence(student, frozen, [term], KINDS[0]).value
    made = count_matrix_products(monkeypatch)
    (got,) = torch.autograd.grad((upstream * found).sum(), student)
    assert not made
    expected = KINDS[0](reference(student, head), reference(term.hidden, term.head).detach())
    close(got, torch.autograd.grad((upstream * expected).sum(), student)[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        quiet = log_linear_divergence(student, head, [term], KINDS[0])
    assert sum(made) == 2 * 9 * 130 and not quiet.value.requires_grad
    close(quiet.value, found.detach(), rtol=1e-5, atol=1e-6)


@every_kind
def test_extreme_logits(divergence):
    student, head = make(0, 5, 33, size=1e4)
    teacher = make(1, 5, 33, 7, size=1e4)
    found = log_linear_divergence(student, head, [TargetTerm(*teacher, 1.0)], divergence).value
    target = reference(*teacher).detach()
    expected = divergence(reference(student, head), target)
    # logits up to 5e4 are known to 3e-3; KL is linear in them
    close(found, expected.float(), rtol=1e-5, atol=2e-2)
    got = torch.autograd.grad(found.sum(), student)[0]
    assert got.isfinite().all()
    wide = expected.detach().abs().max().clamp(min=1)
    close(got / wide, torch.autograd.grad(expected.sum(), student)[0] / wide, rtol=1e-3, atol=2e-2)


@every_kind
def test_forbidden_tokens(divergence):
    """A bias of -inf in student and roles alike: the token takes no part."""
    student, head = make(0, 5, 33)
    teacher, teacher_head = make(1, 5, 33, 7)
    anchor, anchor_head = make(2, 5, 33, 3)
    closed = torch.zeros(33)
    closed[[0, 7, 32]] = -math.inf
    heads = [Head(h.weight, closed) for h in (head, teacher_head, anchor_head)]
    terms = [TargetTerm(teacher, heads[1], 0.7), TargetTerm(anchor, heads[2], 0.3)]
    found = log_linear_divergence(student, heads[0], terms, divergence)
    kept = closed == 0
    cut = [Head(h.weight[kept]) for h in heads]
    logps = [reference(states, h) for states, h in zip((student, teacher, anchor), cut)]
    target = log_linear(logps[1:], [0.7, 0.3]).detach()
    expected = divergence(logps[0], target)
    close(found.value, expected.float(), rtol=1e-4, atol=1e-5)
    close(found.target_entropy, entropy(target).float(), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(found.value.sum(), [student, head.weight])
    for a, b in zip(got, torch.autograd.grad(expected.sum(), [student, head.weight])):
        close(a, b, rtol=1e-3, atol=1e-5)
    taken_away = [TargetTerm(teacher, teacher_head, 1.25), TargetTerm(anchor, heads[2], -0.25)]
    with pytest.raises(ValueError, match="target is infinite"):
        log_linear_divergence(student, head, taken_away, divergence)


def test_mass_where_the_target_has_none():
    student, head = make(0, 3, 9)
    closed = torch.zeros(9)
    closed[4] = -math.inf
    teacher, teacher_head = make(1, 3, 9)
    term = TargetTerm(teacher, Head(teacher_head.weight, closed), 1.0)
    assert log_linear_divergence(student, head, [term], Divergence("reverse_kl")).value.isposinf().all()
    for divergence in (Divergence("forward_kl"), Divergence("jsd", 0.5), Divergence("skew_reverse_kl", 0.1)):
        found = log_linear_divergence(student, head, [term], divergence).value
        expected = divergence(reference(student, head), reference(term.hidden, term.head).detach())
        close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_selected_tokens_over_many_parts(monkeypatch):
    small_tiles(monkeypatch)
    hidden, head = make(0, 9, 130)
    ids = torch.randint(130, (9, 3), generator=torch.Generator().manual_seed(5))
    ids[0], ids[1] = torch.tensor([0, 64, 129]), torch.tensor([5, 5, 5])
    logp = reference(hidden, head)
    close(support_logp(hidden, head, ids), logp.gather(-1, ids).float(), rtol=1e-4, atol=1e-5)
    found = token_logp(hidden, head, ids[:, 1], entropy_gradient=True)
    expected = logp.gather(-1, ids[:, 1:2]).squeeze(-1), entropy(logp)
    upstream = torch.linspace(-1, 1, 9)
    got = torch.autograd.grad((upstream * found.logp + found.entropy).sum(), [hidden, head.weight])
    want = torch.autograd.grad((upstream * expected[0] + expected[1]).sum(), [hidden, head.weight])
    for a, b in zip(got, want):
        close(a, b, rtol=1e-4, atol=1e-5)
    best, values = top_k(hidden, head, 70)
    assert torch.equal(best, logp.topk(70).indices)
    close(values, logp.topk(70).values.float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="found 0 to 130"):
        token_logp(hidden, head, torch.arange(0, 131, 130).repeat(5)[:9])


def test_tied_weights():
    """The head's matrix also makes the hidden states: both gradients meet in it."""
    _, head = make(0, 9, 40)
    ids = torch.arange(9)
    term = TargetTerm(*make(1, 9, 40, 7), 1.0)
    found = log_linear_divergence(head.weight[ids] * 2, head, [term], KINDS[2]).value.mean()
    target = reference(term.hidden, term.head).detach()
    expected = KINDS[2](reference(head.weight[ids] * 2, head), target).mean()
    got, want = (torch.autograd.grad(value, head.weight)[0] for value in (found, expected))
    close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "divergence", [Divergence("reverse_kl"), Divergence("jsd", 0.5)], ids=lambda d: d.kind
)
def test_bfloat16_stays_within_its_rounding(divergence):
    student, head = make(0, 40, 300, 16)
    teacher, teacher_head = make(1, 40, 300, 16)
    low = student.detach().bfloat16().requires_grad_()
    low_head = Head(head.weight.detach().bfloat16().requires_grad_())
    term = TargetTerm(teacher.detach().bfloat16(), Head(teacher_head.weight.detach().bfloat16()), 1.0)
    found = log_linear_divergence(low, low_head, [term], divergence).value
    assert found.dtype == torch.float32
    logp, target = reference(low, low_head), reference(term.hidden, term.head).detach()
    expected = divergence(logp, target)
    # each logit (up to 16) is rounded by 2^-8 of itself at most, on both sides
    close(found, expected.float(), rtol=0, atol=2 * 16 * 2**-8)
    got = torch.autograd.grad(found.mean(), [low, low_head.weight])
    for a, b in zip(got, torch.autograd.grad(expected.mean(), [low, low_head.weight])):
        assert a.dtype == torch.bfloat16
        # an error d of the logits changes probabilities by a factor of exp(d)
        assert (a.float() - b.float()).norm() <= 16 * 2**-8 * b.float().norm()


@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(1, 1), (1, 151_936), (100_000, 151_936), (2048, 100), (7, 10**8)]
)
def test_tiles_keep_to_their_budget(tokens, vocabulary):
    for kept in (False, True):
        step, width = fused.tiles(tokens, vocabulary, "cpu", None, kept)
        assert 1 <= step <= tokens and 1 <= width <= vocabulary
        assert 4 * step * width <= fused.TILE_BYTES["cpu"]
        assert not kept or step == 1 or 4 * step * vocabulary <= fused.KEPT_BYTES["cpu"]
    with pytest.raises(ValueError, match="at least 1 token"):
        fused.tiles(tokens, vocabulary, "cpu", 0, True)
