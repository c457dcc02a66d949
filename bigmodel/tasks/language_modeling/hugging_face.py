"""A causal language model of transformers as a net, with its published weights and tokenizer.

B sequences, T tokens, D width, V vocabulary of the tokenizer, V' >= V that of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.pretrained import published
from bigmodel.tasks.language_modeling.tokenizer import SubwordTokenizer, Tokenizer
from bigmodel.tasks.language_modeling.tokenizer_config import Pretrained

_KIND = "language model"
_REMEDY = "choose a model that has all weights of its architecture"


class CausalLM(nn.Module):
    """Map tokens [B, T] to logits [B, T, V] of each next token.

    Published models often have a larger vocabulary than their tokenizer, because V' is padded. Logits of ids without a
    token are dropped: probabilities are those of the tokens, conditional on the id being one.

    Args:
        model: model of transformers, in evaluation mode.
        vocab_size: V.
        context_length: T, maximum number of input tokens.

    Raises:
        ValueError: if the logits of a token depend on later tokens.
    """

    def __init__(self, model: Any, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.model, self.vocab_size, self.context_length = model, vocab_size, context_length
        self._has_separate_head = False
        self._probe()

    @torch.no_grad()
    def _probe(self) -> None:
        """Check that the model is causal, and detect whether its logits are exactly its output layer of its features."""
        tokens = torch.tensor([[0, 1], [0, 2]])
        whole = self._full_logits(tokens)
        if not torch.allclose(whole[0, 0], whole[1, 0], rtol=1e-4, atol=1e-5):
            raise ValueError("its logits depend on later tokens")
        if self.model.base_model is not self.model and self.model.get_output_embeddings() is not None:
            self._has_separate_head = True
            logits = self.logits(self.features(tokens))
            self._has_separate_head = logits.shape == whole.shape and torch.allclose(
                logits, whole, rtol=1e-5, atol=1e-6
            )

    def _full_logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[..., : self.vocab_size]

    def features(self, tokens: Tensor) -> Tensor:
        """Return the input of the output layer, [B, T, D]; the logits if the model has further operations after it."""
        if not self._has_separate_head:
            return self._full_logits(tokens)
        features: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., V]."""
        if not self._has_separate_head:
            return features
        logits: Tensor = self.model.get_output_embeddings()(features)
        return logits[..., : self.vocab_size]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of the token after each of tokens [B, T]."""
        return self.logits(self.features(tokens))


def load_causal_lm(path: str, flag: str, tokenizer: Tokenizer, context_length: int) -> CausalLM:
    """Load a language model with all of its weights.

    Args:
        path: a folder, or hf://owner/name.
        flag: the flag that was set to the path, for messages.
        tokenizer: of the data.
        context_length: T, tokens of a sequence.

    Raises:
        ValueError: if there is no such model, or it has another tokenizer, a shorter context, or missing weights.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    settings = published.read_settings(path, flag, _KIND, MODEL_FOR_CAUSAL_LM_MAPPING)
    text = settings.get_text_config()  # part of a model that also reads images
    try:
        difference = _tokenizer_difference(published.location(path), tokenizer)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    if difference is None and text.vocab_size < tokenizer.vocab_size:
        difference = f"logits of {text.vocab_size:,} tokens, the data's tokenizer has {tokenizer.vocab_size:,}"
    if difference is not None:
        raise ValueError(
            f"{flag} {path} has another tokenizer than the data ({difference}): set --data.tokenizer"
            f" bigmodel.tasks.language_modeling.Pretrained --data.tokenizer.path {published.location(path)}"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < context_length:
        raise ValueError(
            f"{flag} {path} has a context of {positions:,} tokens, but a sequence of the data has {context_length:,}: set"
            f" --data.context_length {positions}"
        )
    model = published.load(AutoModelForCausalLM, path, flag, _KIND, settings, _REMEDY)
    try:
        return CausalLM(model, tokenizer.vocab_size, context_length)
    except ValueError as error:
        raise ValueError(f"{flag} {path} ({settings.model_type}) is not a causal {_KIND}: {error}") from error


def _tokenizer_difference(where: str, ours: Tokenizer) -> str | None:
    """Describe how the model's own tokenizer encodes text differently; None if it does not."""
    if not isinstance(ours, SubwordTokenizer):
        return f"that is of {ours.kind}"
    end = ours.backend.id_to_token(ours.eos_token_id)
    theirs, _ = Pretrained(where, eos_token=end).read()
    return published.tokenizer_difference(theirs, ours.backend)
