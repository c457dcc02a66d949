"""Distillation losses: divergences between predictions, and distances between features, of student and teacher.

Sources: knowledge distillation (KD), Hinton et al. 2015 (arXiv 1503.02531); decoupled (DKD), arXiv 2203.08679; generalised
Jensen-Shannon divergence (GKD), arXiv 2306.13649; hints (FitNets), arXiv 1412.6550; attention transfer, arXiv 1612.03928;
relational (RKD), arXiv 1904.05068; similarity-preserving, arXiv 1907.09682.

Divergences take log-probabilities, both at the same temperature (`log_probabilities`): a teacher may then be the mean
of several, or given by its most likely classes only (`partition`). -inf is the logarithm of a probability of 0.

B samples, n positions (samples, or the tokens of all sequences), K classes (or tokens), k of them cached, D width,
C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / T) [..., K], in float32 at least."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)


def binary_logits(logits: Tensor) -> Tensor:
    """Convert logits [..., K] of independent labels to those of K distributions over two outcomes [..., K, 2]:
    softmax([z, 0]) = [sigmoid(z), 1 - sigmoid(z)].
    """
    return torch.stack([logits, torch.zeros_like(logits)], -1)


def mean_of_probabilities(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean of several teachers' probabilities [..., K]."""
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return torch.stack(list(log_probabilities)).logsumexp(0) - math.log(len(log_probabilities))


def partition(logits: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities [..., k + 1] of some classes, and of the rest together.

    The divergence of two partitions is at most that of the distributions (data processing inequality), and equal to it
    if k = K.

    Args:
        logits: [..., K].
        classes: [..., k] int64, each once.
        temperature: T.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    top = scaled.gather(-1, classes)
    lowest = torch.finfo(scaled.dtype).min / 2  # the logarithm of a sum of only -inf has no gradient
    rest = scaled.scatter(-1, classes, lowest).logsumexp(-1, keepdim=True)
    rest = rest.masked_fill(rest < lowest / 2, -torch.inf)  # all other classes have probability 0
    return F.log_softmax(torch.cat([top, rest], -1), -1)


def kullback_leibler(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum_c p_c log(p_c / q_c) [...] in nats, of distributions [..., K]; terms with p_c = 0 are 0."""
    ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0)
    return (log_p.exp() * ratio).sum(-1)


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) [n]. The factor T^2 keeps gradients of the same size at every temperature.

    Args:
        student, teacher: log-probabilities [n, K] at the temperature.
        temperature: T.
    """
    return temperature**2 * kullback_leibler(teacher, student)


def dkd_parts(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of KL(teacher || student) = target part + (1 - p_t[y]) non-target part, each [n].

    Args:
        student, teacher: log-probabilities [n, K].
        targets: classes y [n] int64.

    Returns:
        The divergence of (p_y, 1 - p_y), and that of the distributions over the classes other than y.
    """

    def split(log_p: Tensor) -> tuple[Tensor, Tensor]:
        others = log_p.scatter(-1, targets[:, None], -torch.inf)  # [n, K]
        sum_of_others = others.logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(-1, targets[:, None]), sum_of_others], -1), others - sum_of_others

    (binary_student, others_student), (binary_teacher, others_teacher) = split(student), split(teacher)
    return kullback_leibler(binary_teacher, binary_student), kullback_leibler(others_teacher, others_student)


def dkd(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Return T^2 (alpha target part + beta non-target part) [n], see `dkd_parts`."""
    target, others = dkd_parts(student, teacher, targets)
    return temperature**2 * (alpha * target + beta * others)


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Return beta KL(p || m) + (1 - beta) KL(q || m) [n], with m = beta p + (1 - beta) q, p the teacher, q the student.

    Args:
        student, teacher: log-probabilities [n, K].
        beta: in 0 to 1. At the ends the divergence itself is 0, so the limit after division by beta or 1 - beta is
            used: 0 is the forward divergence KL(p || q), 1 the reverse KL(q || p).
    """
    if beta == 0:
        return kullback_leibler(teacher, student)
    if beta == 1:
        return kullback_leibler(student, teacher)
    lowest = torch.finfo(student.dtype).min / 2  # the sum of two zeros has no gradient
    mixture = torch.logaddexp(teacher.clamp(lowest) + math.log(beta), student.clamp(lowest) + math.log1p(-beta))
    return beta * kullback_leibler(teacher, mixture) + (1 - beta) * kullback_leibler(student, mixture)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error [B, ...] of features [B, ..., D], averaged over D."""
    return (student - teacher).square().mean(-1)


def attention_map(features: Tensor) -> Tensor:
    """Return the attention map: squared features averaged over channels, as a vector [B, P] of length 1.

    Args:
        features: [B, C, H, W], or tokens [B, T, C].
    """
    squares = features.square().mean(1 if features.ndim == 4 else -1)
    return F.normalize(squares.flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error [B] of the attention maps, averaged over positions.

    Maps of images are averaged to the size of the smaller one.

    Args:
        student, teacher: [B, C, H, W] or [B, T, C], each with its own C.
    """
    if student.ndim == 4:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    return (attention_map(student) - attention_map(teacher)).square().mean(1)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the smooth L1 loss of the pairwise distances of samples, averaged over pairs.

    Distances are divided by the mean of the positive ones.

    Args:
        student, teacher: [B, D], each with its own D.
    """

    def distances(features: Tensor) -> Tensor:
        pairwise = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # [B, B]
        positive = pairwise > 0
        return pairwise / (pairwise.sum() / positive.sum().clamp(min=1)).clamp(min=torch.finfo(pairwise.dtype).tiny)

    return F.smooth_l1_loss(distances(student), distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the smooth L1 loss of the cosines of the angles of all triples of samples, averaged over triples.

    Memory: B^2 D + B^3 numbers.

    Args:
        student, teacher: [B, D], each with its own D.
    """

    def cosines(features: Tensor) -> Tensor:
        towards = F.normalize(features[None] - features[:, None], dim=-1)  # [B, B, D], from the first to the second
        return towards @ towards.mT  # [B, B, B]

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of the similarities of all pairs of samples, rows of length 1, summed and divided by
    B^2.

    Args:
        student, teacher: [B, ...].
    """

    def similarities(features: Tensor) -> Tensor:
        flat = features.flatten(1)
        return F.normalize(flat @ flat.T)  # [B, B]

    return F.mse_loss(similarities(student), similarities(teacher))


def counted_sum(values: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of the values [...] that count.

    Args:
        values: [...].
        counted: bool, of that shape.
    """
    return torch.where(counted, values, 0).sum()


def sum_in_chunks(loss_of: Callable[..., Tensor], rows: Sequence[Tensor], chunk_size: int | None) -> Tensor:
    """Return the sum of a loss, or of each of L losses, over rows, in chunks.

    Chunks are recomputed in the backward pass, so that one is in memory at a time.

    Args:
        loss_of: the sum over some rows, [] or [L], called with a part of each tensor.
        rows: tensors [n, ...].
        chunk_size: rows at once; None: all.
    """
    if chunk_size is None or chunk_size >= len(rows[0]):
        return loss_of(*rows)
    parts = zip(*(tensor.split(chunk_size) for tensor in rows), strict=True)
    return torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum(0)
