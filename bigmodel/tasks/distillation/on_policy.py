"""On-policy distillation: the student learns from what it writes itself, as its teacher sees it.

Source: generalised knowledge distillation (GKD), Agarwal et al. 2024 (arXiv 2306.13649), algorithm 1: in a share of the
steps the student goes on with the beginnings of the batch's sequences. No gradient goes through what is drawn.

B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bigmodel.data.stateless_rng import hash_seed, sample_keys
from bigmodel.training.callbacks.training_log import outside_mfu

_WHICH_STEPS = 1  # beside the seed, for the draw of a step


@dataclass(frozen=True)
class OnPolicy:
    """Let the student write a share of the batches. In these the losses count what it wrote, and its own loss does not.

    Which steps they are is a function of the seed and the step, what is written of the seed, the step and the sample: the
    same on any number of processes, and after a resume.

    Args:
        share: of the optimizer steps, above 0 and at most 1.
        max_new_tokens: so many tokens at the end of each sequence are the student's, 1 to the context's length.
        temperature: of its draws; 0 takes the likeliest token each time.
        seed: of both.
    """

    share: float = 0.5
    max_new_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"--model.on_policy.share {self.share} must lie in 0 < share <= 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"--model.on_policy.max_new_tokens {self.max_new_tokens}: at least 1 token is needed")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--model.on_policy.temperature {self.temperature} must be 0 or above")

    def check(self, sizes: dict[str, int]) -> None:
        """See that sequences are as long as what shall be written.

        Raises:
            ValueError: if they are not.
        """
        length = sizes.get("context_length", self.max_new_tokens)
        if self.max_new_tokens > length:
            raise ValueError(
                f"--model.on_policy.max_new_tokens {self.max_new_tokens}: of sequences of {length} tokens"
                f" (--data.context_length), 1 to {length} can be the student's"
            )

    def chosen(self, step: int) -> bool:
        """Whether the student writes the batch of an optimizer step."""
        return hash_seed(self.seed, step, _WHICH_STEPS) < self.share * 2.0**64

    def rewrite(self, student: Any, batch: Any, step: int) -> Any:
        """The batch [B, ...] of an optimizer step as the student writes it."""
        keys = sample_keys(self.seed, step, batch.index)
        with torch.no_grad(), outside_mfu():
            return student.rewrite(batch, keys, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
