"""Speed and memory of preparing data, against the tokenizer json2binidx uses, and of reading it.

    python scripts/bench/data.py --megabytes 200 --workers 2

Makes a .jsonl of recombined English sentences (those of Python's own manual), tokenises a part of
it with the pure-Python trie of the `rwkv` package and all of it with scripts/prepare_data.py, then
feeds the result to a loop over batches. Everything lies in a temporary folder.
"""

import argparse
import itertools
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finchtune.data import load_data
from finchtune.data.binidx import BinIdx
from finchtune.data.prefetch import prefetch

PREPARE = Path(__file__).parents[1] / "prepare_data.py"
TRIE_MEGABYTES = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200, help="size of the .jsonl")
    parser.add_argument("--workers", type=int, default=2, help="of prepare_data.py")
    parser.add_argument("--seconds", type=float, default=5, help="of reading, per mode")
    parser.add_argument("--folder", help="where the files go, instead of the system's place")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        corpus, prefix = Path(folder) / "corpus.jsonl", Path(folder) / "corpus"
        write_corpus(corpus, flags.megabytes * 1_000_000)
        trie, trie_ns = trie_speed(corpus)
        print(f"trie, one process: {trie / 1e6:.3f} M tokens/s")
        seconds, peak = prepare(corpus, prefix, flags.workers)
        n_tokens = BinIdx(prefix).n_tokens
        speed = n_tokens / seconds
        print(
            f"prepare_data.py, {flags.workers} workers: {corpus.stat().st_size / 1e6:.0f} MB and "
            f"{n_tokens / 1e6:.1f} M tokens in {seconds:.2f} s, {speed / 1e6:.2f} M tokens/s\n"
            f"ratio: {speed / trie:.1f}\n"
            f"processor time of a token: {processor_seconds() / n_tokens * 1e9:.0f} ns in all "
            f"processes, {trie_ns:.0f} ns in the trie\n"
            f"peak memory of all its processes: {peak / 2**20:.0f} MiB"
        )
        for dataload in ("pad", "pack", "get"):
            plain, ahead = (
                reading_speed(prefix, dataload, flags.seconds, a) for a in (False, True)
            )
            print(
                f"reading, {dataload}: {plain / 1e6:.1f} M tokens/s, "
                f"{ahead / 1e6:.1f} through the thread that reads ahead"
            )


def sentences() -> list[str]:
    """A few thousand sentences and lines of code of Python's manual."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return [part for part in re.split(r"(?<=[.:])\s+|\n\n+", text) if part.strip()]


def write_corpus(path: Path, size: int) -> None:
    """At least `size` bytes of documents, drawn at random; of 1 to 80 sentences, most of few."""
    draw, pool = random.Random(0), sentences()
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            parts = draw.choices(pool, k=min(80, 1 + int(draw.expovariate(1 / 12))))
            text = " ".join(parts)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def trie_speed(corpus: Path) -> tuple[float, float]:
    """Of the pure-Python trie alone, JSON not counted, on the first texts: tokens per second, and
    nanoseconds of the processor per token.
    """
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    trie = TRIE_TOKENIZER(str(Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")))
    with corpus.open("rb") as file:
        texts = [json.loads(line)["text"] for line in file.readlines(TRIE_MEGABYTES * 1_000_000)]
    began, used = time.perf_counter(), time.process_time()
    n_tokens = sum(len(trie.encode(text)) for text in texts)
    used = time.process_time() - used
    return n_tokens / (time.perf_counter() - began), used / n_tokens * 1e9


def prepare(corpus: Path, prefix: Path, workers: int) -> tuple[float, int]:
    """Run prepare_data.py; its seconds from start to end, and the peak of its resident bytes."""
    flags = ["--input", corpus, "--output", prefix, "--workers", workers, "--overwrite"]
    began = time.perf_counter()
    command = [sys.executable, str(PREPARE), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0, f"prepare_data.py ended with status {process.returncode}"
    return time.perf_counter() - began, peak


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident_bytes(pid: int) -> int:
    """Of a process and its children, pages that they share counted for each. Linux only."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in [pid, *children]]
    except (FileNotFoundError, ProcessLookupError):  # one of them has just ended
        return 0
    return sum(pages) * resource.getpagesize()


def reading_speed(prefix: Path, dataload: str, seconds: float, ahead: bool) -> float:
    """Inputs per second, padding not counted, in micro batches of 8 rows at ctx_len 1024.

    `ahead`: in a thread of its own, as in training, where the handing over of a batch costs more
    than its making but continues beside the step.
    """
    data = load_data(str(prefix), "binidx", dataload, 1024)
    made = (data.rows(step, 0, 1, 8, 1)[0] for step in itertools.count())
    batches = prefetch(made) if ahead else made
    began, n_tokens = time.perf_counter(), 0
    for batch in batches:
        n_tokens += int((batch.labels >= 0).sum())
        if time.perf_counter() - began > seconds:
            break
    batches.close()
    return n_tokens / seconds


if __name__ == "__main__":
    main()
