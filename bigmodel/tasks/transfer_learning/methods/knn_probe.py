"""k-nearest-neighbour probe: predicts from the training samples with the most similar features.

Source: Wu et al. 2018 (arXiv 1805.01978, section 3.4): cosine similarity s, the k nearest vote, each with weight
exp(s / temperature).

The probe is an evaluation, `KNNEvaluation`, which runs in a fit of one optimizer step without gradients: Lightning saves a
checkpoint only after an optimizer step, and DDP requires a parameter.

N training samples, B rows of a batch, D width of the features, K classes, k neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from bigmodel.internals import limit_to_one_step
from bigmodel.tasks.transfer_learning.methods.base import Method, freeze
from bigmodel.tasks.transfer_learning.methods.feature_cache import FeatureCaching
from bigmodel.tasks.transfer_learning.problem_type import REGRESSION, SINGLE_LABEL

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
        problem_type: for regression, the weighted mean of the neighbours' targets is predicted.
        num_classes: K.
        num_samples: N, before the samples are set.
        width: D.

    Attributes:
        excluded: [B], numbers of the training samples in a training batch, which are not their own neighbours.
    """

    def __init__(
        self, k: int, temperature: float, problem_type: str, num_classes: int, num_samples: int, width: int
    ) -> None:
        super().__init__()
        self.k, self.temperature, self.problem_type = k, temperature, problem_type
        self.excluded: Tensor | None = None
        self.features: Tensor  # [N, D], of length 1
        self.answers: Tensor  # [N, K]: 1 for the class, or the labels, or the number
        self.register_buffer("features", torch.zeros(num_samples, width))
        self.register_buffer("answers", torch.zeros(num_samples, num_classes))
        # Always 0, added to the logits: a loss needs a gradient, and DDP a parameter.
        self.nominal = nn.Parameter(torch.zeros(()))

    def resize(self, num_samples: int) -> None:
        """Allocate memory for this number of samples."""
        self.features = self.features.new_zeros(num_samples, self.features.shape[1])
        self.answers = self.answers.new_zeros(num_samples, self.answers.shape[1])

    def fit(self, features: Tensor, targets: Tensor) -> None:
        """Store the training samples: features [N, D], and targets as in the data."""
        self.features = F.normalize(features.float(), dim=-1).to(self.features.device)
        targets = targets.to(self.features.device)
        if self.problem_type == SINGLE_LABEL:
            self.answers = F.one_hot(targets.long(), self.answers.shape[1]).float()
        else:
            self.answers = targets.float().view(len(targets), -1)

    def forward(self, features: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Return logits [B, K] of features [B, D]; see `excluded` of the class."""
        excluded = self.excluded if excluded is None else excluded
        with torch.autocast(features.device.type, enabled=False):
            similarity, nearest = self.nearest(features.float(), excluded)
            votes = (similarity / self.temperature).softmax(-1)  # [B, k]
            mean = (votes[..., None] * self.answers[nearest]).sum(-2)  # [B, k, K] -> [B, K]
        if self.problem_type == SINGLE_LABEL:
            mean = mean.clamp(min=_LEAST).log()
        elif self.problem_type != REGRESSION:
            mean = mean.clamp(_LEAST, 1 - _LEAST).logit()
        return mean + self.nominal

    def nearest(self, features: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return similarities [B, k] and numbers [B, k] of the nearest training samples, computed block by block."""
        features = F.normalize(features, dim=-1)
        best = features.new_full((len(features), 0), 0.0)
        which = torch.empty(len(features), 0, dtype=torch.int64, device=features.device)
        for start in range(0, len(self.features), _BLOCK):
            similarity = features @ self.features[start : start + _BLOCK].T  # [B, block]
            numbers = torch.arange(start, start + similarity.shape[1], device=features.device)
            if excluded is not None:
                similarity = similarity.masked_fill(numbers == excluded[:, None], float("-inf"))
            best = torch.cat([best, similarity], 1)
            which = torch.cat([which, numbers.expand_as(similarity)], 1)
            best, order = best.topk(min(self.k, best.shape[1]), dim=1)
            which = which.gather(1, order)
        return best, which


class KNNProbe(Method):
    """Predicts from the nearest training samples in the features of the backbone; nothing trains.

    The run is one step long. It logs metrics of the training samples as `leave_one_out/...`, each predicted without
    itself. The training features are part of the checkpoint, so that a loaded task needs no data.

    Args:
        k: number of neighbours.
        temperature: a neighbour of cosine similarity s votes with weight exp(s / temperature).

    Raises:
        ValueError: fewer training samples than neighbours besides itself, or features that differ each time.
    """

    requires_training = False

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        if k < 1:
            raise ValueError(f"--model.method.k {k} must be at least 1")
        if not temperature > 0:
            raise ValueError(f"--model.method.temperature {temperature} must be above 0")
        self.k, self.temperature = k, temperature
        self.num_samples = 0

    def wrap(self, net: Any, problem_type: str) -> None:
        freeze(net)
        num_classes, width = net.head.weight.shape
        net.dropout = nn.Identity()  # as in evaluation
        net.head = Neighbors(self.k, self.temperature, problem_type, num_classes, self.num_samples, width)

    def callbacks(self, task: TransferLearning) -> list[Callback]:
        return [KNNEvaluation(self, task)]

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, Any], net: Any) -> None:
        self.num_samples = state["num_samples"]
        if net is not None:
            net.head.resize(self.num_samples)


class KNNEvaluation(FeatureCaching):
    """Fills the head of a `KNNProbe` with the training features, evaluates it, and ends the fit after a validation.

    Args:
        method: has the number of neighbours.
        task: the task whose net has the head.
    """

    def __init__(self, method: KNNProbe, task: TransferLearning) -> None:
        super().__init__(task, splits=("train",))
        self.method = method

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # one optimizer step, then a validation
            limit_to_one_step(trainer)
            trainer.val_check_interval, trainer.check_val_every_n_epoch = trainer.accumulate_grad_batches, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        cache = self.caches["train"]
        assert cache is not None
        self.method.num_samples = number = cache.num_samples
        if number <= self.method.k:
            raise ValueError(
                f"--model.method.k {self.method.k} must be below the number of training samples, {number}: set it to at"
                f" most {number - 1}"
            )
        samples = cache.read(torch.arange(number))
        self.task.net.head.fit(samples["features"], samples["targets"])

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the leave-one-out metrics of the training samples; each process evaluates its share."""
        head, metrics = self.task.net.head, self.task.new_metrics()
        for numbers in torch.arange(trainer.global_rank, self.method.num_samples, trainer.world_size).split(_ROWS):
            rows = numbers.to(self.task.device)
            answers = head.answers[rows]
            if head.problem_type == SINGLE_LABEL:
                answers = answers.argmax(-1)
            elif head.problem_type == REGRESSION:
                answers = answers.squeeze(-1)
            metrics.update(head(head.features[rows], rows), answers)
        self.task.log_metrics("leave_one_out", metrics)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.task.net.head.excluded = batch.index

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        optimizer.zero_grad()  # without gradients, the step changes nothing

    def on_train_batch_end(self, *args: Any) -> None:
        self.task.net.head.excluded = None
