"""Instructions that a warp issues for one chunk of 64 tokens in the WKV tensor-core kernels.

    python scripts/dev/count_sass.py                 # compute capability 9.0
    python scripts/dev/count_sass.py --arch 80 89 --operators wkv7 --json counts.json

Counted in the machine code that nvcc and nvdisasm give: the longest path through the loop over
chunks, a full chunk with checkpoints and states. Loops inside count as often as they run: WKV6's
preparation of a block once for each 16 channels, loops over blocks four times, the recomputation of
states once for each earlier block. Out-of-line code for diverged warps is left out: they never
diverge there.
"""

import argparse
import functools
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from finchtune.errors import UserError, run_cli
from finchtune.files import write_json
from finchtune.ops.kernels.build import SOURCE_FOLDER
from finchtune.ops.kernels.toolkit import BuildError, cuda_home

# Of each kernel the source, and how often each loop inside the one over chunks runs for one
# iteration of the loop around it, in the order of their first instructions.
KERNELS: dict[str, tuple[str, list[float]]] = {
    "forward_kernel": ("wkv6", [4, 4]),
    "backward_kernel": ("wkv6", [4, 4, 1.5]),
    "chunk_forward_kernel": ("wkv7", [4]),
    "chunk_backward_kernel": ("wkv7", [4, 4, 1.5]),
}
SOURCES = sorted({source for source, _ in KERNELS.values()})
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
KINDS = {"tensor core": "HMMA", "barriers": "BAR.SYNC", "shuffles": "SHFL", "matrix loads": "LDSM"}


@dataclass
class Block:
    """A run of instructions without jumps into or out of its middle."""

    code: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # labels
    falls_through: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", type=int, default=[90])
    parser.add_argument("--operators", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--json", help="also write the counts to this file")
    given = parser.parse_args()
    found = {arch: count(arch, given.operators) for arch in given.arch}
    for arch, kernels in found.items():
        for name, counts in kernels.items():
            said = ", ".join(f"{kind} {n:.0f}" for kind, n in counts.items())
            print(f"sm_{arch} {name}: {said}")
    if given.json:
        write_json(given.json, found)


def nvdisasm() -> str:
    """The disassembler: on the PATH, in the toolkit, or from pip install nvidia-cuda-nvdisasm."""
    wheel = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    folders = [None, str(cuda_home() / "bin"), str(wheel)]
    found = (shutil.which("nvdisasm", path=folder) for folder in folders)
    program = next((path for path in found if path), None)
    if program is None:
        raise UserError("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return program


def listing(nvcc: Path, name: str, arch: int) -> str:
    """The machine code of a file of cuda/gpu for this architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        source = SOURCE_FOLDER / "gpu" / f"{name}.cu"
        command = [nvcc, "-cubin", f"-arch=sm_{arch}", *FLAGS, source, "-o", cubin]
        subprocess.run(command, check=True)
        return subprocess.run(
            [nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True
        ).stdout


def count(arch: int, sources: Collection[str]) -> dict[str, dict[str, float]]:
    """The counts of each kernel of these sources, compiled for this architecture."""
    try:
        nvcc = cuda_home() / "bin" / "nvcc"
    except BuildError as error:
        raise UserError(str(error)) from error
    code = {source: listing(nvcc, source, arch) for source in sources}
    return {
        name: chunk_counts(blocks_of(code[source], source, name), iterations)
        for name, (source, iterations) in KERNELS.items()
        if source in code
    }


def blocks_of(listing: str, namespace: str, kernel: str) -> dict[str, Block]:
    """The basic blocks of the tensor-core kernel of this name, by label, in order."""
    blocks: dict[str, Block] = {}
    inside, current = False, Block()
    for text in listing.splitlines():
        if text.startswith(".text."):
            inside = re.search(rf"N4{namespace}\d+{kernel}ENS_", text) is not None
            current = Block()
            if inside:
                blocks["start"] = current
        elif inside and (label := re.match(r"(\.L_x_\d+):", text)):
            current = blocks.setdefault(label[1], Block())
        elif inside and (found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", text)):
            instruction = found[1]
            current.code.append(instruction)
            jump = re.search(r"\bBRA(?!\.DIV)\S*\s.*`\((\.L_x_\d+)\)", instruction)
            if jump:
                current.targets.append(jump[1])
            ends = re.match(r"(BRA|EXIT|RET)\b(?!\.DIV)", instruction)
            if ends or (jump and instruction.startswith("@")):
                current.falls_through = ends is None
                current = blocks.setdefault(f"after {len(blocks)}", Block())
    return blocks


def chunk_counts(blocks: dict[str, Block], iterations: list[float]) -> dict[str, float]:
    """Instructions of one iteration of the outer loop with tensor-core products, and some kinds."""
    edges = successors(blocks)
    loops = natural_loops(edges)
    working = {h for h in loops if any("HMMA" in x for b in loops[h] for x in blocks[b].code)}
    chunk = max(working, key=lambda header: len(loops[header]))
    order = list(blocks)
    first = {h: min(order.index(b) for b in loops[h]) for h in loops}
    inner = sorted((h for h in loops if h in loops[chunk] and h != chunk), key=first.__getitem__)
    assert len(inner) == len(iterations), f"{len(inner)} loops inside the one over chunks: {inner}"
    times = dict(zip(inner, iterations, strict=True))
    kinds = {"all": "", **KINDS}
    paths = longest_path(chunk, blocks, edges, loops, times, tuple(kinds.values()))
    return dict(zip(kinds, paths, strict=True))


def successors(blocks: dict[str, Block]) -> dict[str, list[str]]:
    """The blocks that may follow each block that the start reaches."""
    order = list(blocks)
    edges: dict[str, list[str]] = {}
    waiting = ["start"]
    while waiting:
        label = waiting.pop()
        if label in edges:
            continue
        place = order.index(label) + 1
        follows = order[place : place + 1] if blocks[label].falls_through else []
        edges[label] = [*blocks[label].targets, *follows]
        waiting += edges[label]
    return edges


def natural_loops(edges: dict[str, list[str]]) -> dict[str, set[str]]:
    """The blocks of each loop by its header: a block that dominates one that jumps back to it."""
    before: dict[str, set[str]] = {label: set() for label in edges}
    for label, follows in edges.items():
        for other in follows:
            before[other].add(label)
    dominators = {label: set(edges) for label in edges} | {"start": {"start"}}
    changed = True
    while changed:
        changed = False
        for label in edges:
            if label == "start":
                continue
            own = set.intersection(*(dominators[x] for x in before[label])) | {label}
            changed |= own != dominators[label]
            dominators[label] = own
    loops: dict[str, set[str]] = {}
    for label, follows in edges.items():
        for header in (x for x in follows if x in dominators[label]):
            body = loops.setdefault(header, {header})
            waiting = [label]
            while waiting:
                x = waiting.pop()
                if x not in body:
                    body.add(x)
                    waiting += before[x]
    return loops


def longest_path(
    header: str,
    blocks: dict[str, Block],
    edges: dict[str, list[str]],
    loops: dict[str, set[str]],
    times: dict[str, float],
    kinds: tuple[str, ...],
) -> tuple[float, ...]:
    """Instructions of each kind on the longest path of one iteration of a loop."""
    body = loops[header]

    def own(label: str) -> tuple[tuple[float, ...], list[str]]:
        """Counts of a block, or of a whole loop that it heads; and what follows."""
        if label != header and label in times:
            once = longest_path(label, blocks, edges, loops, times, kinds)
            inner = loops[label]
            leave = [x for b in inner for x in edges[b] if x not in inner]
            return tuple(times[label] * n for n in once), leave
        code = blocks[label].code
        counts = tuple(float(sum(k in x for x in code if "NOP" not in x)) for k in kinds)
        return counts, edges[label]

    @functools.cache
    def best(label: str) -> tuple[float, ...]:
        counts, follows = own(label)
        rest = [best(x) for x in follows if x in body and x != header]
        return tuple(map(sum, zip(counts, max(rest), strict=True))) if rest else counts

    return best(header)


if __name__ == "__main__":
    run_cli(main)
