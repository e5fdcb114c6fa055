"""Time and memory of exporting a model of a released size, against a plain copy.

    python scripts/bench/export.py --size 3B --to gguf --dtype fp16 --repeats 3

Writes random bf16 weights into a temporary folder, and there copies the file and exports it,
alternately. Wants three times the model's size on the disk. Memory is the exporting process's own,
without the pages of mapped files. For numbers that mean something the machine has to be idle.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finchtune.models import released_sizes
from finchtune.weights.forms import FORMS, get_form
from merge import copy, multiples, shown, timed, write_weights

EXPORT = Path(__file__).parents[1] / "export.py"
OWN = re.compile(r"RssAnon:\s+(\d+) kB")
PAUSE = 0.005  # seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="3B", choices=sorted(released_sizes()))
    parser.add_argument("--to", default="gguf", choices=[f.name for f in FORMS.values() if f.write])
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to make the temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        base = Path(folder, "base.pth")
        output = Path(folder, "out", f"model{get_form(given.to).suffix}")
        write_weights(given.size, base)
        copies, synced, exports, memory = [], [], [], 0
        for _ in range(given.repeats):
            copies.append(timed(lambda: copy(base, sync=False)))
            synced.append(timed(lambda: copy(base, sync=True)))
            begin = time.perf_counter()
            memory = max(memory, export(base, output, given.to, given.dtype))
            exports.append(time.perf_counter() - begin)
            shutil.rmtree(output.parent)
        print(f"{given.size}, {base.stat().st_size / 1e9:.2f} GB, to {given.to} in {given.dtype}")
        print(f"copy:   {shown(copies)}; until it is on the disk: {shown(synced)}")
        print(f"export: {shown(exports)}, at most {memory / 1e9:.2f} GB beside mapped files")
        print(multiples(exports, copies, synced))


def export(base: Path, output: Path, to: str, dtype: str) -> int:
    """Export in a process of its own; the most bytes that it had beside mapped files."""
    flags = ["--model", base, "--to", to, "--dtype", dtype, "--output", output]
    process = subprocess.Popen([sys.executable, EXPORT, *flags], stdout=subprocess.DEVNULL)
    memory = 0
    while process.poll() is None:
        found = OWN.search(Path(f"/proc/{process.pid}/status").read_text())
        memory = max(memory, 1024 * int(found[1]) if found else 0)  # none while it ends
        time.sleep(PAUSE)
    if process.returncode:
        sys.exit(process.returncode)
    return memory


if __name__ == "__main__":
    main()
