"""The losses against their constants, against what public libraries document, and where probabilities are 0."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bigmodel.tasks.distillation import (
    AttentionTransfer,
    Hint,
    Relational,
    SimilarityPreserving,
    loss_terms,
    losses,
    module,
)
from bigmodel.tasks.distillation.losses import log_probabilities
from bigmodel.training import schedules

S = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
T = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
LABEL = torch.tensor([0])


def both(temperature=1.0, student=S, teacher=T):
    return log_probabilities(student, temperature), log_probabilities(teacher, temperature)


def random_logits(*shape, num=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(num)]


def test_constants():
    """Computed twice, independently; to 1e-9 (they have ten digits)."""
    assert losses.kd(*both(4), 4).item() == pytest.approx(0.9594724446, abs=1e-9)
    target, others = losses.dkd_parts(*both(4), LABEL)
    assert 16 * target.item() == pytest.approx(0.9435977519, abs=1e-9)
    assert 16 * others.item() == pytest.approx(0.0305885064, abs=1e-9)
    assert losses.dkd(*both(4), LABEL, 4, 1, 8).item() == pytest.approx(1.1883058031, abs=1e-9)
    for beta, expected in ((0, 0.8469120011), (1, 0.9416833510), (0.5, 0.2047359260)):
        assert losses.generalised_jsd(*both(), beta).item() == pytest.approx(expected, abs=1e-9)


def test_kd_is_its_two_parts():
    student, teacher = random_logits(50, 7)
    targets = torch.arange(50) % 7
    log_student, log_teacher = both(3, student, teacher)
    target, others = losses.dkd_parts(log_student, log_teacher, targets)
    not_target = 1 - log_teacher.gather(1, targets[:, None])[:, 0].exp()
    torch.testing.assert_close(losses.kd(log_student, log_teacher, 3), 9 * (target + not_target * others))


def test_kd_has_gradients_of_one_size_at_high_temperature():
    """The gradient goes to (z_s - z_t) / K for logits of mean 0 (Hinton et al., equation 4)."""
    student, teacher = (logits - logits.mean(1, keepdim=True) for logits in random_logits(4, 5))
    student.requires_grad_()
    losses.kd(*both(1e4, student, teacher), 1e4).sum().backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 5, rtol=1e-3, atol=1e-4)


def test_against_torchdistill():
    """The formulas of torchdistill 1.1.5. Its KDLoss leaves out T^2 where there is no hard-label term: there it is ours
    divided by T^2. Its hints are a plain MSELoss; its attention transfer sums over several pairs of layers."""
    student, teacher = random_logits(6, 5)
    kl_div = torch.nn.KLDivLoss(reduction="batchmean")
    theirs = kl_div(torch.log_softmax(student / 4, dim=1), torch.softmax(teacher / 4, dim=1))
    torch.testing.assert_close(losses.kd(*both(4, student, teacher), 4).mean(), 16 * theirs)

    a, b = random_logits(6, 8, 4, 4)[0], random_logits(6, 5, 4, 4, seed=1)[0]
    theirs = (F.normalize(a.pow(2).mean(1).flatten(1)) - F.normalize(b.pow(2).mean(1).flatten(1))).pow(2).mean()
    torch.testing.assert_close(losses.attention_transfer(a, b).mean(), theirs)
    assert losses.attention_transfer(a, F.interpolate(b, scale_factor=2)).mean() == pytest.approx(theirs.item())

    a, b = random_logits(6, 8)[0], random_logits(6, 5, seed=1)[0]

    def distances(e):
        squares = e.pow(2).sum(dim=1)
        found = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * e @ e.t()).clamp(min=1e-12).sqrt()
        found[range(len(e)), range(len(e))] = 0
        return found / found[found > 0].mean()

    torch.testing.assert_close(losses.rkd_distance(a, b), F.smooth_l1_loss(distances(a), distances(b)))

    def angles(e):
        normed = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), p=2, dim=2)
        return torch.bmm(normed, normed.transpose(1, 2)).view(-1)

    torch.testing.assert_close(losses.rkd_angle(a, b), F.smooth_l1_loss(angles(a), angles(b)))
    g_a, g_b = F.normalize(a @ a.t(), dim=1), F.normalize(b @ b.t(), dim=1)
    torch.testing.assert_close(losses.similarity_preserving(a, b), torch.norm(g_a - g_b) ** 2 / 6**2)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_against_trl(beta):
    """The formula of trl 1.16's GKDTrainer: logits divided by T, but no T^2; the mean over labels that count."""
    student, teacher = random_logits(6, 5)
    s, t = torch.log_softmax(student / 2, -1), torch.log_softmax(teacher / 2, -1)
    if beta in (0, 1):
        theirs = F.kl_div(s, t, reduction="none", log_target=True)
        theirs = theirs if beta == 0 else F.kl_div(t, s, reduction="none", log_target=True)
    else:
        mixture = torch.logsumexp(torch.stack([s + math.log1p(-beta), t + math.log(beta)]), dim=0)
        kl_teacher = F.kl_div(mixture, t, reduction="none", log_target=True)
        theirs = beta * kl_teacher + (1 - beta) * F.kl_div(mixture, s, reduction="none", log_target=True)
    torch.testing.assert_close(losses.generalised_jsd(*both(2, student, teacher), beta), theirs.sum(-1))


def test_the_ends_of_the_divergence_are_its_limits():
    beta = 1e-5
    student, teacher = both(1)
    forward = losses.generalised_jsd(student, teacher, beta) / beta
    torch.testing.assert_close(forward, losses.generalised_jsd(student, teacher, 0), rtol=1e-4, atol=0)
    reverse = losses.generalised_jsd(student, teacher, 1 - beta) / beta
    torch.testing.assert_close(reverse, losses.generalised_jsd(student, teacher, 1), rtol=1e-4, atol=0)


def test_relations_are_of_triples_by_brute_force():
    a, b = random_logits(5, 3)
    total = 0.0
    for i in range(5):
        for j in range(5):
            for k in range(5):
                cosine = [F.normalize(e[j] - e[i], dim=0) @ F.normalize(e[k] - e[i], dim=0) for e in (a, b)]
                total += F.smooth_l1_loss(*cosine).item()
    assert losses.rkd_angle(a, b).item() == pytest.approx(total / 125)
    moved = 3 * a @ torch.linalg.qr(b.T @ b)[0] + 7
    for relation in (losses.rkd_distance, losses.rkd_angle):
        assert relation(a, moved).item() == pytest.approx(0, abs=1e-12), "neither place, scale nor rotation matters"
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    (losses.rkd_distance(same, b[:4]) + losses.rkd_angle(same, b[:4])).backward()
    assert same.grad.isfinite().all(), "of samples that lie together too"


@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_partition_of_all_classes_is_the_distribution(k):
    student, teacher = random_logits(20, 9)
    student.requires_grad_()
    kept = teacher.topk(k).indices
    parts = [losses.partition(logits, kept, 2) for logits in (student, teacher)]
    log_student, log_teacher = both(2, student, teacher)
    p = log_teacher.exp().gather(1, kept)
    torch.testing.assert_close(parts[1].exp(), torch.cat([p, 1 - p.sum(1, keepdim=True)], 1))
    for loss in (lambda s, t: losses.kd(s, t, 2), losses.generalised_jsd):
        coarse, fine = loss(*parts), loss(log_student, log_teacher)
        assert (coarse <= fine + 1e-12).all(), "data processing"
        gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (coarse, fine)]
        assert gradients[0].isfinite().all()
        if k == 9:
            torch.testing.assert_close(coarse, fine)
            torch.testing.assert_close(*gradients)


def test_a_partition_whose_rest_is_impossible_has_gradients():
    """As where all items are kept, and the padding item is the rest."""
    student, teacher = (F.pad(logits, (1, 0), value=-torch.inf).float() for logits in random_logits(6, 5))
    student.requires_grad_()
    kept = torch.arange(1, 6).expand(6, 5)
    value = losses.kd(*(losses.partition(logits, kept, 2) for logits in (student, teacher)), 2)
    torch.testing.assert_close(value, losses.kd(*both(2, student, teacher), 2))
    assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_what_has_no_probability_adds_nothing():
    """As the padding item of a recommender, which both models give -inf."""
    student, teacher = random_logits(6, 5)
    targets = torch.arange(6) % 5
    padded = [F.pad(logits, (1, 0), value=-torch.inf).requires_grad_() for logits in (student, teacher)]
    for loss in (
        lambda s, t, y: losses.kd(s, t, 4),
        lambda s, t, y: losses.dkd(s, t, y, 4),
        lambda s, t, y: losses.generalised_jsd(s, t, 0.3),
        lambda s, t, y: losses.generalised_jsd(s, t, 1),
    ):
        value = loss(*(log_probabilities(logits, 4) for logits in padded), targets + 1)
        torch.testing.assert_close(value, loss(*both(4, student, teacher), targets))
        assert torch.autograd.grad(value.sum(), padded[0])[0].isfinite().all()


def test_several_teachers_are_the_mean_of_their_probabilities():
    logits = random_logits(6, 5, num=3)
    mean = losses.mean_of_probabilities([log_probabilities(x, 3) for x in logits])
    torch.testing.assert_close(mean.exp(), torch.stack([(x / 3).softmax(-1) for x in logits]).mean(0))


@pytest.mark.parametrize("chunk_size", [None, 3, 7, 100])
def test_chunks_have_the_sum_and_the_gradients_of_the_whole(chunk_size):
    """Positions that do not count add nothing."""
    features, teacher = random_logits(20, 4)
    weight = random_logits(4, 9)[0].requires_grad_()
    teacher = F.pad(teacher, (0, 5))
    teacher[3] = 1e6
    counted = torch.arange(20) % 4 != 3
    calls = []

    def loss_of(rows, teacher_rows, counted_rows):
        calls.append(len(rows))
        values = losses.kd(*both(2, rows @ weight, teacher_rows), 2)
        return losses.counted_sum(values, counted_rows)

    total = losses.sum_in_chunks(loss_of, [features, teacher, counted], chunk_size)
    gradient = torch.autograd.grad(total, weight)[0]
    assert max(calls) <= (chunk_size or 20)
    rows = [i for i in range(20) if i % 4 != 3]
    expected = losses.kd(*both(2, features[rows] @ weight, teacher[rows]), 2).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0])


def test_halves_are_computed_in_float32():
    student, teacher = (logits.half() for logits in random_logits(6, 5))
    value = losses.kd(*both(4, student, teacher), 4)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, losses.kd(*both(4, student.float(), teacher.float()), 4))


@pytest.mark.parametrize(
    ("term", "is_sum"),
    [(Hint(), True), (AttentionTransfer(), True), (Relational(), False), (SimilarityPreserving(), False)],
)
def test_terms_of_layers_are_sums_over_samples(term, is_sum):
    """So accumulation changes nothing, but for the two that compare samples with each other."""
    pair = [logits.float() for logits in random_logits(4, 3, 5)]  # [B, T, D]
    counted = torch.arange(4 * 3).reshape(4, 3) % 5 != 0
    term.prepare(*(features.shape for features in pair))
    halves = [term(*(features[rows] for features in pair), counted[rows]) for rows in (slice(2), slice(2, None))]
    assert torch.isclose(sum(halves), term(*pair, counted), rtol=1e-5) == is_sum


@pytest.mark.parametrize("term", [Relational(), SimilarityPreserving()])
def test_relations_are_computed_in_float32(term):
    """Under autocast too: of samples near to their teacher's, products of halves are a fifth off."""
    teacher, noise = (features.float() for features in random_logits(32, 64))
    student, counted = teacher + noise / 20, torch.ones(32, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(student, teacher, counted)
    torch.testing.assert_close(value, term(student, teacher, counted))


def test_what_fills_up_a_text_does_not_count():
    """In terms of layers: a text is the same beside longer ones."""
    student, teacher = (features.float() for features in random_logits(3, 4, 8))
    mask = torch.arange(6) < torch.tensor([4, 2, 3])[:, None]
    counted, batch = torch.ones(3, dtype=torch.bool), SimpleNamespace(mask=mask[:, :4])
    longer, filled = SimpleNamespace(mask=mask), [F.pad(x, (0, 0, 0, 2), value=7) for x in (student, teacher)]
    hint = loss_terms.Hint()
    hint.prepare(torch.Size([1, 4, 8]), torch.Size([1, 4, 8]))
    for term in (hint, loss_terms.AttentionTransfer(), loss_terms.Relational(), loss_terms.SimilarityPreserving()):
        value = term(student, teacher, module._shares(batch, counted))
        torch.testing.assert_close(term(*filled, module._shares(longer, counted)), value)
    alone = [hint(student[i : i + 1, :n], teacher[i : i + 1, :n], counted[:1]) for i, n in enumerate((4, 2, 3))]
    torch.testing.assert_close(hint(student, teacher, module._shares(batch, counted)), sum(alone))


@pytest.mark.parametrize("schedule", [schedules.Step(warmup_steps=2, gamma=0.0), schedules.Linear(warmup_steps=2)])
def test_a_temperature_that_ends_at_0_is_refused(schedule):
    with pytest.raises(ValueError, match="KD ends at temperature 0, which must be above 0"):
        loss_terms.KD(temperature_schedule=schedule)
