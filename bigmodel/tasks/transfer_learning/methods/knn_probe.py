"""k-nearest-neighbour probe: predicts from the training samples with the most similar features.

Source: Wu et al. 2018 (arXiv 1805.01978, section 3.4): cosine similarity s, the k nearest vote, each with weight
exp(s / temperature).

N training samples, B rows of a batch, D width of the features, K classes, k neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.tasks.transfer_learning.methods.base import Method, freeze
from bigmodel.tasks.transfer_learning.methods.feature_cache import cache_features, check_cacheable

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning

_ROWS = 256  # queries per block
_BLOCK = 16_384  # training samples per block
_LEAST = 1e-6  # probability of a class without votes, so that its logarithm is finite


class Neighbors(nn.Module):
    """The head: features [B, D] -> logits [B, K], the logarithms of the neighbours' votes.

    Args:
        k: number of neighbours.
        temperature: of their weights.
        problem: class, labels or number; for numbers, the weighted mean is predicted.
        num_classes: K.
        num_samples: N, before the samples are set.
        width: D.
    """

    def __init__(
        self, k: int, temperature: float, problem: str, num_classes: int, num_samples: int, width: int
    ) -> None:
        super().__init__()
        self.k, self.temperature, self.problem = k, temperature, problem
        self.features: Tensor  # [N, D], of length 1
        self.answers: Tensor  # [N, K]: 1 for the class, or the labels, or the number
        self.register_buffer("features", torch.zeros(num_samples, width))
        self.register_buffer("answers", torch.zeros(num_samples, num_classes))
        # A dummy parameter: Lightning needs an optimizer step in order to write a checkpoint.
        self.nominal = nn.Parameter(torch.zeros(()))

    def resize(self, num_samples: int) -> None:
        """Allocate memory for this number of samples."""
        self.features = self.features.new_zeros(num_samples, self.features.shape[1])
        self.answers = self.answers.new_zeros(num_samples, self.answers.shape[1])

    def remember(self, features: Tensor, targets: Tensor) -> None:
        """Store the training samples: features [N, D], and targets as in the data."""
        self.features = F.normalize(features.float(), dim=-1).to(self.features.device)
        targets = targets.to(self.features.device)
        if self.problem == "class":
            self.answers = F.one_hot(targets.long(), self.answers.shape[1]).float()
        else:
            self.answers = targets.float().view(len(targets), -1)

    def forward(self, features: Tensor, itself: Tensor | None = None) -> Tensor:
        """Return logits [B, K] of features [B, D]; for training samples, `itself` [B] are their numbers, which are
        excluded.
        """
        with torch.autocast(features.device.type, enabled=False):
            similarity, nearest = self.nearest(features.float(), itself)
            votes = (similarity / self.temperature).softmax(-1)  # [B, k]
            mean = (votes[..., None] * self.answers[nearest]).sum(-2)  # [B, k, K] -> [B, K]
        if self.problem == "number":
            return mean
        if self.problem == "class":
            return mean.clamp(min=_LEAST).log()
        return mean.clamp(_LEAST, 1 - _LEAST).logit()

    def nearest(self, features: Tensor, itself: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return similarities [B, k] and numbers [B, k] of the nearest training samples, computed block by block."""
        features = F.normalize(features, dim=-1)
        best = features.new_full((len(features), 0), 0.0)
        which = torch.empty(len(features), 0, dtype=torch.int64, device=features.device)
        for start in range(0, len(self.features), _BLOCK):
            similarity = features @ self.features[start : start + _BLOCK].T  # [B, block]
            numbers = torch.arange(start, start + similarity.shape[1], device=features.device)
            if itself is not None:
                similarity = similarity.masked_fill(numbers == itself[:, None], float("-inf"))
            best = torch.cat([best, similarity], 1)
            which = torch.cat([which, numbers.expand_as(similarity)], 1)
            best, order = best.topk(min(self.k, best.shape[1]), dim=1)
            which = which.gather(1, order)
        return best, which


class KNNProbe(Method):
    """Predicts from the nearest training samples in the features of the backbone; nothing trains.

    The run is one step long. It logs metrics of the training samples as `leave_one_out/...`, each predicted from the
    others. The training features are part of the checkpoint, so that a loaded task needs no data.

    Args:
        k: number of neighbours.
        temperature: a neighbour of cosine similarity s votes with weight exp(s / temperature).

    Raises:
        ValueError: fewer training samples than neighbours besides itself, or features that differ each time.
    """

    optimizes = False

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        if k < 1:
            raise ValueError(f"--model.method.k {k} must be at least 1")
        if not temperature > 0:
            raise ValueError(f"--model.method.temperature {temperature} must be above 0")
        self.k, self.temperature = k, temperature
        self.num_samples = 0

    def prepare(self, net: Any, problem: str) -> None:
        freeze(net)
        num_classes, width = net.head.weight.shape
        net.head = Neighbors(self.k, self.temperature, problem, num_classes, self.num_samples, width)

    def setup(self, task: TransferLearning) -> None:
        check_cacheable(task, "")

    def on_fit_start(self, task: TransferLearning) -> None:
        kept = cache_features(task, "train")
        assert kept is not None
        self.num_samples = kept.num_samples
        if self.num_samples <= self.k:
            raise ValueError(
                f"--model.method.k {self.k}: there are {self.num_samples} training samples, one of which may be asked"
                f" about; set it to at most {self.num_samples - 1}"
            )
        samples = kept.read(torch.arange(self.num_samples))
        task.net.head.remember(samples["features"], samples["targets"])

    def on_train_start(self, task: TransferLearning) -> None:
        """Predict each training sample from the others; each process does its share."""
        head, metrics = task.net.head, task.new_metrics()
        rank, world_size = task.trainer.global_rank, task.trainer.world_size
        for numbers in torch.arange(rank, self.num_samples, world_size).split(_ROWS):
            itself = numbers.to(task.device)
            answers = head.answers[itself]
            targets = answers.argmax(-1) if head.problem == "class" else answers
            metrics.update(
                head(head.features[itself], itself), targets.squeeze(-1) if head.problem == "number" else targets
            )
        task.log_metrics("leave_one_out", metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, Any], net: Any) -> None:
        self.num_samples = state["num_samples"]
        if net is not None:
            net.head.resize(self.num_samples)
