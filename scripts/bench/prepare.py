"""Seconds to prepare text, beside what the tokenizers library needs to encode the same text in batches.

    python scripts/bench/prepare.py [--copies 8] [--processes 2] [--rounds 3] [--path "{stdlib}/**/*.py"]

Both use the same trained tokenizer and the same number of cores, and are run in turns. *tokenizers* reads the documents into
memory and calls `encode_batch` on all of them at once, with its own threads, and keeps the ids. *prepare* starts from the
files: it finds and checks them (hash, UTF-8), starts its workers, encodes, and writes shards through to the disk. The
training of the tokenizer is in neither.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigmodel.tasks.language_modeling.prepare import make_plan, prepare
from bigmodel.tasks.language_modeling.sources import find_files
from bigmodel.tasks.language_modeling.splits import DocumentHashSplit
from bigmodel.tasks.language_modeling.tokenizer_config import BPE, Pretrained

ENCODE = """
import sys, time
from pathlib import Path
from tokenizers import Tokenizer
backend = Tokenizer.from_file(sys.argv[1])
start = time.perf_counter()
texts = [path.read_bytes().decode() for path in sorted(Path(sys.argv[2]).rglob("*")) if path.is_file()]
ids = [encoding.ids for encoding in getattr(backend, sys.argv[3])(texts, add_special_tokens=False)]
print(time.perf_counter() - start, sum(map(len, ids)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="{stdlib}/**/*.py", help="files, folder or glob")
    parser.add_argument("--copies", type=int, default=1, help="how many times to take the text")
    parser.add_argument("--one_file", action="store_true", help="join all of it into one document")
    parser.add_argument("--method", default="encode_batch", help="of tokenizers: encode_batch or encode_batch_fast")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    exclude = ["**/test/**", "**/tests/**", "**/idle_test/**", "**/site-packages/**"]
    with tempfile.TemporaryDirectory() as scratch:
        text, made = Path(scratch, "text"), Path(scratch, "tokenizer.json")
        files, _ = find_files(options.path, exclude)
        documents = [Path(file.path).read_bytes() for file in files]
        text.mkdir()
        if options.one_file:
            documents = [b"\n".join(documents) * options.copies]
        for copy in range(1 if options.one_file else options.copies):
            for number, document in enumerate(documents):
                (text / f"{copy:04d}-{number:06d}.txt").write_bytes(document)
        BPE().build(document.decode() for document in documents[:10000]).backend.save(str(made))
        tokenizer_config = Pretrained(scratch, eos_token="<|endoftext|>")
        size = sum(path.stat().st_size for path in text.iterdir())
        print(f"{size / 1e6:,.1f} MB in {len(list(text.iterdir())):,} files, {options.processes} processes")
        ratios = []
        for _ in range(options.rounds):
            environment = {**os.environ, "RAYON_NUM_THREADS": str(options.processes), "TOKENIZERS_PARALLELISM": "true"}
            command = [sys.executable, "-c", ENCODE, str(made), str(text), options.method]
            answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
            theirs = float(answer[0])
            start = time.perf_counter()
            plan = make_plan(str(text), tokenizer_config, DocumentHashSplit(val=0), [], str(Path(scratch, "cache")))
            prepared = prepare(plan, options.processes)
            ours = time.perf_counter() - start
            written = sum(split.tokens - split.documents for split in prepared.splits.values())
            assert written == int(answer[1]), "the same text must give the same number of tokens"
            shutil.rmtree(Path(scratch, "cache"))
            ratios.append(ours / theirs)
            print(f"tokenizers {theirs:7.2f} s   prepare {ours:7.2f} s   ratio {ours / theirs:5.2f}")
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
