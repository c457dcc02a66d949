"""Tokenizers: exact round trips, travel as JSON, what cannot be loaded."""

import json
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmodel.tasks.language_modeling.tokenizer import StreamDecoder, SubwordTokenizer, Tokenizer, UnknownCharacter
from bigmodel.tasks.language_modeling.tokenizer_config import BPE, Bytes, Characters, Pretrained

AWKWARD = [
    "",
    "plain words, and 'quotes' that can't hurt",
    "line\nends\r\nof\rall  kinds\n\n\n \t\n",
    "nul \0 and \x1c\x85\u2028\u3000\u00a0 spaces",
    "déjà vu, e\u0301, 中文。\n日本語, \U0001f469\u200d\U0001f52c \U0001f600\ufffd\ufeff",
    "<|endoftext|> is text here",
]
TRAINING = [*AWKWARD, "the quick brown fox jumps over the lazy dog\n" * 20, "def f(x):\n    return x\n" * 20]


@pytest.fixture(scope="module", params=[BPE(vocab_size=300), Bytes(), Characters()], ids=["bpe", "bytes", "characters"])
def tokenizer(request):
    return request.param.build(TRAINING)


def test_round_trip_is_exact_and_ids_are_in_the_vocabulary(tokenizer):
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_token_id not in ids
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|endoftext|>"


def test_json_holds_the_whole_tokenizer(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.vocab_size, again.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_token_id)
    assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)
    assert again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "morse"}', '{"kind": "subwords"}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match="not a tokenizer that bigmodel saved"):
        Tokenizer.from_json(text)


def test_stream_equals_decode_and_never_shows_half_a_character(tokenizer):
    for text in [*AWKWARD, "".join(AWKWARD) * 3]:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) + stream.finish() == text
        assert "".join(pieces) == text.rstrip("\ufffd")


def test_stream_equals_decode_for_tokens_that_are_no_utf8():
    tokenizer = Bytes().build([])
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.choice([65, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 256]) for _ in range(60)]
        stream = StreamDecoder(tokenizer)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == tokenizer.decode(ids)


def test_stream_shows_each_character_with_its_last_byte():
    stream = StreamDecoder(Bytes().build([]))
    assert [stream.push(byte) for byte in "aé\U0001f600".encode()] == ["a", "", "é", "", "", "", "\U0001f600"]


@pytest.mark.parametrize("decoder", ["metaspace", "llama"])
def test_streams_of_sentencepiece_tokenizers_have_all_spaces(decoder):
    """The space before a word is left out only at the start of a text, not after a prompt."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.decoder = decoders.Metaspace() if decoder == "metaspace" else strip
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["the quick brown fox jumps over the lazy dog"] * 20
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    tokenizer = SubwordTokenizer(backend, eos_token_id=1)
    text = "the quick fox  jumps over the brown dog " * 4 + ("é\U0001f600 fox" if decoder == "llama" else "")
    ids = tokenizer.encode(text)
    for start in range(len(ids)):
        before = tokenizer.decode(ids[:start])
        stream = StreamDecoder(tokenizer, ids[:start])
        new = "".join([stream.push(i) for i in ids[start:]]) + stream.finish()
        if not before.endswith("\ufffd"):
            assert before + new == tokenizer.decode(ids)


def test_bpe_has_the_asked_size_and_is_the_same_each_time():
    words = " ".join(f"w{i}" for i in range(2000)) + "\n"
    one, other = (BPE(vocab_size=400).build([words] * 3) for _ in range(2))
    assert one.vocab_size == 400
    assert one.to_json() == other.to_json()
    assert len(one.encode(words)) < 0.6 * len(words)


@pytest.mark.parametrize("size", [0, 256])
def test_bpe_that_cannot_hold_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=r"vocab_size .* at least 257"):
        BPE(vocab_size=size)


def test_character_outside_the_training_text_is_named():
    tokenizer = Characters().build(["cab", "b"])
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert tokenizer.vocab_size == 4
    with pytest.raises(UnknownCharacter, match=r"'é' at position 2 ") as error:
        tokenizer.encode("abé")
    assert error.value.position == 2


@pytest.fixture
def folder(tmp_path):
    """A tokenizer in Hugging Face format that also truncates, pads and adds a first token, none of which may apply."""
    backend = BPE(vocab_size=300).build(TRAINING).backend
    backend.add_special_tokens(["<s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    return tmp_path


def test_pretrained_folder(folder):
    tokenizer = Pretrained(str(folder)).build()
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<s>"
    assert tokenizer.vocab_size == tokenizer.eos_token_id + 1
    assert Pretrained(str(folder), eos_token="<|endoftext|>").build().eos_token_id == 0


def test_pretrained_is_identified_by_content(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    before = Pretrained(str(folder)).settings()
    assert Pretrained(str(other)).settings() == before
    assert Pretrained(str(other), eos_token="<|endoftext|>").settings() != before


def test_pretrained_in_the_older_format(folder):
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    expected = Pretrained(str(folder), eos_token="<|endoftext|>").build().encode(TRAINING[1])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in state["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    assert Pretrained(str(folder)).build().encode(TRAINING[1]) == expected


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").rename(f / "vocab.json"), "it has vocab.json, but merges.txt is missing"),
        (lambda f: (f / "tokenizer.json").rename(f / "merges.txt"), "it has merges.txt, but vocab.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "set --data.tokenizer.eos_token"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not a JSON object"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": "no"}'), "'no' is not in the vocabulary"),
    ],
)
def test_incomplete_folder_is_refused(folder, break_it, message):
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        Pretrained(str(folder)).build()


def test_missing_folder_is_refused_without_asking_the_network(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Pretrained(str(tmp_path / "nothing")).build()


def test_vocabulary_with_holes_has_room_for_the_largest_id():
    backend = Backend(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    assert SubwordTokenizer(backend, eos_token_id=7).vocab_size == 8
