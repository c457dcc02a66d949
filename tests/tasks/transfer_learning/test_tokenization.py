"""Text encoders: tokens and truncation equal those of the libraries; saved and restored."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from bigmodel.tasks.language_modeling.tokenizer import ByteTokenizer
from bigmodel.tasks.transfer_learning.batches import text_batch
from bigmodel.tasks.transfer_learning.tokenization import (
    LanguageModelEncoder,
    TextEncoder,
    TransformersEncoder,
    read_encoder,
)

FIRST = ["a dog", "The red house by the river, old and slow!", "unbelievableness " * 9, "x"]
SECOND = ["another dog sat there", "no", "night morning " * 7, "y"]


def word_level(*, template=None):
    """A small tokenizer of whole words, with the special tokens of RoBERTa around or with none."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.add_special_tokens(["<s>", "<pad>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [("<s>", 0), ("</s>", 2)]
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return backend


@pytest.mark.parametrize("pairs", [None, SECOND])
@pytest.mark.parametrize("max_length", [None, 5, 6, 7, 8, 12, 13, 23])
def test_tokens_equal_transformers(encoder, minilm, pairs, max_length):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected = tokenizer(FIRST, pairs, truncation="longest_first" if max_length else False, max_length=max_length)
    got = [encoder.truncate(row, max_length) for row in encoder.encode(FIRST, pairs)]
    assert [row.tolist() for row in got] == expected["input_ids"]
    assert [encoder.segments(row).tolist() for row in got] == expected["token_type_ids"]
    assert {row.dtype for row in got} == {np.dtype(np.int32)}


def test_padding_equals_transformers(encoder, minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected = tokenizer(FIRST, SECOND, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    batch = text_batch(encoder, FIRST, SECOND)
    for got, name in ((batch.tokens, "input_ids"), (batch.mask, "attention_mask"), (batch.segments, "token_type_ids")):
        assert got.long().equal(expected[name])
    assert text_batch(encoder, ["word " * 600]).tokens.shape == (1, 512), "no further than there are positions"


def test_padded_width_does_not_exceed_positions():
    encoder = TransformersEncoder(word_level(template=True), 1, 2, max_length=5)
    assert text_batch(encoder, ["a b c a b c"]).tokens.tolist() == [[0, 4, 5, 6, 2]]


def test_two_separators_as_in_roberta():
    encoder = TransformersEncoder(word_level(template=True), 1, 2, None)
    one, two = encoder.encode(["a b c"])[0], encoder.encode(["a b c"], ["b b"])[0]
    assert (one.tolist(), two.tolist()) == ([0, 4, 5, 6, 2], [0, 4, 5, 6, 2, 2, 5, 5, 2])
    assert encoder.truncate(one, 4).tolist() == [0, 4, 5, 2]
    assert encoder.truncate(two, 8).tolist() == [0, 4, 5, 2, 2, 5, 5, 2]
    assert not encoder.segments(two).any()


def test_end_of_text_separates_pairs():
    bare = TransformersEncoder(word_level(), 1, 2, None)
    assert bare.encode(["a b"], ["c"])[0].tolist() == [4, 5, 2, 6]
    assert bare.truncate(bare.encode(["a b c"], ["c"])[0], 4).tolist() == [4, 5, 2, 6]
    with pytest.raises(ValueError, match=r"--data\.pair_column requires a tokenizer with"):
        TransformersEncoder(word_level(), 1, None, None).encode(["a"], ["b"])


def test_special_tokens_in_text_are_plain_text(encoder):
    for row in encoder.encode(["a [SEP] b [CLS]", "[PAD]"]):
        assert (row == 102).sum() == (row == 101).sum() == 1
        assert (row != 0).all()
    assert not encoder.segments(encoder.encode(["a [SEP] b"])[0]).any()


def test_language_model_encoder():
    encoder = LanguageModelEncoder(ByteTokenizer(), 8)
    end = ByteTokenizer.eos_token_id
    assert encoder.encode(["hi"], ["you"])[0].tolist() == [end, *b"hi", end, *b"you"]
    assert encoder.truncate(encoder.encode(["a longer text"])[0], 8).tolist() == [end, *b"a longe"]


@pytest.mark.parametrize("kind", ["minilm", "bare", "bytes"])
def test_to_dict_and_from_dict(encoder, kind):
    made = {
        "minilm": encoder,
        "bare": TransformersEncoder(word_level(), 1, 2, 16),
        "bytes": LanguageModelEncoder(ByteTokenizer(), 32),
    }[kind]
    again = TextEncoder.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.fingerprint == made.fingerprint
    assert (again.pad_id, again.max_length, again.special_tokens) == (made.pad_id, made.max_length, made.special_tokens)
    both = [some.encode(["a b"], ["c [SEP]"])[0].tolist() for some in (made, again)]
    assert both[0] == both[1]


def test_fingerprints_differ_between_tokenizers(encoder):
    others = [encoder, TransformersEncoder(word_level(), 1, 2, None), TransformersEncoder(word_level(), 1, None, None)]
    assert len({some.fingerprint for some in [*others, LanguageModelEncoder(ByteTokenizer(), 3)]}) == 4
    longer = TransformersEncoder(word_level(), 1, 2, 16)
    assert longer.fingerprint == others[1].fingerprint, "how much is read is not what is tokenized"


def test_invalid_tokenizers_raise(encoder, tmp_path):
    with pytest.raises(ValueError, match="no readable tokenizer"):
        read_encoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"--data.max_length 3 is too small: 3 tokens are special, so at least 5"):
        encoder.truncate(encoder.encode(["a"], ["b"])[0], 3)
    with pytest.raises(ValueError, match="not the saved state of a text encoder"):
        TextEncoder.from_dict({"kind": "another"})
