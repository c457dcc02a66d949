"""On-policy distillation: the student learns from text that it generates, with the teacher's predictions for it.

Source: generalised knowledge distillation (GKD), Agarwal et al. 2024 (arXiv 2306.13649), algorithm 1: in a share of the
steps the student continues the prompts of the batch's sequences. No gradient flows through the sampling.

B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bigmodel.data.stateless_rng import hash_seed, sample_keys
from bigmodel.training.callbacks.training_log import outside_mfu

_STEP_DRAW = 1  # distinguishes the draw of a step from other uses of the seed


@dataclass(frozen=True)
class OnPolicy:
    """Lets the student generate a share of the batches. The loss of these is that of the terms at the generated tokens.

    The choice of steps depends on the seed and the step; the generated tokens depend on the seed, the step and the
    sample. Both are the same on any number of processes, and after a resume.

    Args:
        share: of the optimizer steps, above 0 and at most 1.
        max_new_tokens: number of generated tokens at the end of each sequence, 1 to the context length.
        temperature: of the sampling; 0: greedy decoding.
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
            raise ValueError(f"--model.on_policy.max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--model.on_policy.temperature {self.temperature} must be 0 or above")

    def check(self, sizes: dict[str, int]) -> None:
        """Check that sequences are at least as long as the generated part.

        Raises:
            ValueError: if they are not.
        """
        length = sizes.get("context_length", self.max_new_tokens)
        if self.max_new_tokens > length:
            raise ValueError(
                f"--model.on_policy.max_new_tokens {self.max_new_tokens} must be 1 to {length}, the number of tokens of a"
                " sequence (--data.context_length)"
            )

    def is_on_policy(self, step: int) -> bool:
        """True if the student generates the batch of this optimizer step."""
        return hash_seed(self.seed, step, _STEP_DRAW) < self.share * 2.0**64

    def sample(self, student: Any, batch: Any, step: int) -> Any:
        """Return the batch [B, ...] of an optimizer step with the tokens that the student generates."""
        keys = sample_keys(self.seed, step, batch.index)
        with torch.no_grad(), outside_mfu():
            return student.sample_on_policy(
                batch, keys, max_new_tokens=self.max_new_tokens, temperature=self.temperature
            )
