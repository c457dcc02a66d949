"""Documents in blocks have the tokens of the whole, whatever the text and the tokenizer."""

import random

import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from bigmodel.tasks.language_modeling import encode
from bigmodel.tasks.language_modeling.encode import encode_blocks, find_cut, iter_text_blocks, sample_text
from bigmodel.tasks.language_modeling.sources import Segment, TextFile, find_files
from bigmodel.tasks.language_modeling.tokenizer import SubwordTokenizer
from bigmodel.tasks.language_modeling.tokenizer_config import BPE, Bytes, Characters

PIECES = [
    "a",
    "bc",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "é",
    "\U0001f600",
    "\u3000",
    "\u00a0",
    "'s",
    "12",
    ".",
    ")",
    "x = y",
]
PIECES += [
    "<|endoftext|>",
    "\0",
    "e\u0301",
    "中文",
    "\u2028",
    "\x85",
    "\x1c",
    "\n\n    ",
    "\ufffd",
    "\ufeff",
    ");\n",
    "//",
]


def awkward(length, seed=0):
    draw = random.Random(seed)
    return "".join(draw.choices(PIECES, k=length))


def segment(tmp_path, data):
    path = tmp_path / "document.txt"
    path.write_bytes(data)
    return Segment(TextFile(str(path), path.name, len(data)), 0, len(data))


def byte_level():
    return BPE(vocab_size=400).build([awkward(3000)])


def punctuation_takes_line_ends():
    """As in the pre-tokenizers since GPT-4, with Unicode normalization."""
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = byte_level()
    tokenizer.backend.normalizer = normalizers.NFC()
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return SubwordTokenizer(tokenizer.backend, tokenizer.eos_token_id)


def treats_the_start_otherwise():
    tokenizer = byte_level()
    tokenizer.backend.normalizer = normalizers.Prepend("x")
    return SubwordTokenizer(tokenizer.backend, tokenizer.eos_token_id)


def characters():
    return Characters().build(PIECES)


TOKENIZERS = [
    byte_level,
    punctuation_takes_line_ends,
    treats_the_start_otherwise,
    characters,
    lambda: Bytes().build([]),
]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("block_bytes", [5, 64, 1000])
def test_blocks_have_the_tokens_of_the_whole(tmp_path, make, block_bytes):
    tokenizer = make()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for seed in range(3):
        content = awkward(400, seed)
        blocks = list(iter_text_blocks([segment(tmp_path, content.encode())], block_bytes))
        got = [encode_blocks(str(tmp_path / "tokenizer.json"), some) for some in blocks]
        assert np.concatenate([tokens for tokens, _ in got]).tolist() == [
            *tokenizer.encode(content),
            tokenizer.eos_token_id,
        ]
        assert sum(size for _, size in got) == len(content.encode())


def test_blocks_are_cut_where_they_can_be(tmp_path):
    document = segment(tmp_path, ("some words\r\n\r\n  and more;\n" * 20).encode())
    places = range(10, 400, 10)
    for make in (byte_level, punctuation_takes_line_ends, characters):
        cuts = [find_cut(make(), document, near, 20) for near in places]
        assert all(cut is not None and near <= cut < near + 20 for near, cut in zip(places, cuts, strict=True))
    assert {find_cut(treats_the_start_otherwise(), document, near, 20) for near in places} == {None}


def test_sample_is_even_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE_BYTES", 10)
    contents = [bytes([65 + i]) * (5 + 7 * i) for i in range(20)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i:02d}.txt").write_bytes(content)
    segments = [Segment(file, 0, file.size) for file in find_files(str(tmp_path))[0]]
    whole = b"".join(contents).decode()
    assert "".join(sample_text(segments, None)) == "".join(sample_text(segments, len(whole))) == whole
    places = [k * len(whole) // 15 for k in range(15)]
    assert "".join(sample_text(segments, 150)) == "".join(whole[at : at + 10] for at in places)
