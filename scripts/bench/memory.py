"""Peak resident memory of `bigmodel fit`, its children included, on 1 GB of text minus that on 10 MB [MB].

Each text is one file of the standard library's source, repeated; the run prepares it (BPE, as by default) and takes a few
steps. Memory is the sum over the processes, read from /proc every 50 ms, so pages that they share count more than once.
"""

from __future__ import annotations

import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from bench.common import BENCH, environment, fit_gpt, report


def write(path: Path, size: int) -> None:
    """At least `size` bytes of source in one file."""
    sources = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    source = b"\n".join(sources).decode(errors="ignore").encode()
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(source[: size - file.tell()].decode(errors="ignore").encode() or b"\n")


def resident(root: int) -> int:
    """Bytes resident now, of a process and all that it started."""
    parents, pages = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(folder.name)] = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    family = {root}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(pages.get(process, 0) for process in family) * 4096


def watch(command: list[str], folder: str) -> list[tuple[float, int]]:
    """Run a command to its end: seconds since 1970 and bytes resident, every 50 ms. Its output goes to a file in a folder.

    Raises:
        RuntimeError: if it fails, with what it printed.
    """
    seen = []
    with open(Path(folder, "output"), "w+") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            seen.append((time.time(), resident(process.pid)))
            time.sleep(0.05)
        output.seek(0)
        if process.returncode:
            raise RuntimeError(output.read())
    return seen


def peak(size: int) -> float:
    """Peak of a run on a text of so many bytes [MB]."""
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        text = Path(folder, "text.py")
        write(text, size)
        flags = f"--data.path {text} --data.cache_dir {folder}/cache --runs_dir {folder}/runs"
        command = fit_gpt("small", 5, f"{flags} --data.tokenizer bigmodel.tasks.language_modeling.BPE")
        seen = watch(command, folder)
    most = max(size for _, size in seen)
    print(f"{size / 1e6:,.0f} MB of text: {most / 1e6:,.0f} MB resident, {seen[-1][0] - seen[0][0]:.0f} s", flush=True)
    return most / 1e6


def main() -> None:
    small = peak(10_000_000)
    report(peak(1_000_000_000) - small)


if __name__ == "__main__":
    main()
