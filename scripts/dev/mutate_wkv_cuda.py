"""Break the CUDA kernels in many small ways and show that their emulated tests notice each.

Every barrier of a block or a warp is dropped once, every wait for copies is loosened, and the
faults listed in `FAULTS` are put in: wrong addresses, masks and sums, copies that begin too early.
A fault that no test notices is printed, and the exit status is then 1. It works on a copy of the
sources; a run takes some half an hour.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from finchtune.errors import run_cli

ROOT = Path(__file__).parents[2]
TESTS = {name: Path(f"tests/ops/{name}/test_cuda_emulated.py") for name in ("wkv6", "wkv7")}
KERNEL_FILES = (
    "block.cuh",
    "forward.cuh",
    "backward.cuh",
    "segments.cuh",
    "scan_forward.cuh",
    "scan_backward.cuh",
    "wkv7_forward.cuh",
    "wkv7_backward.cuh",
    "wkv7_gradients.cuh",
)
# Of each occurrence in these files: what it is called, and what it becomes.
EVERYWHERE = {
    "__syncthreads();": ("barrier", ""),
    "__syncwarp();": ("warp barrier", ""),
    "async_wait<0>();": ("wait", "async_wait<1>();"),
    "async_wait<1>();": ("wait", "async_wait<2>();"),
    "wait_for_block<0>(": ("wait", "wait_for_block<1>("),
    "wait_for_block<1>(": ("wait", "wait_for_block<2>("),
}


@dataclass
class Fault:
    """In `file`, the occurrence number `count` of `right` becomes `wrong`."""

    name: str
    file: str
    right: str
    wrong: str
    count: int = 0

    @property
    def test(self) -> Path:
        """The tests of the operator whose kernels have the fault; WKV6's where both do."""
        return TESTS["wkv7" if self.file.startswith("wkv7") else "wkv6"]

    def apply(self, folder: Path) -> None:
        path = folder / "cuda" / "gpu" / self.file
        parts = path.read_text().split(self.right)
        assert len(parts) > self.count + 1, f"{self.name}: {self.file} has no such code any more"
        head, tail = self.right.join(parts[: self.count + 1]), parts[self.count + 1 :]
        path.write_text(head + self.wrong + self.right.join(tail))


# Neighbouring lines that an order is put wrong with.
BARRIER = "    __syncthreads();\n"
PREPARE = "    if (lane.warp < blocks) prepare_own_block("
LOAD_W = "    if (next_valid > 0) load_chunk(shared.w, args.w + next, pieces, next_valid);\n"
LOAD_KEYS = "    if (next_valid > 0) load_keys(shared, args, pieces, next, next_valid);\n"
LOAD_V = "    if (next_valid > 0) load_chunk(shared.v, args.v + next, pieces, next_valid);\n"
STORE_Y = "    store_chunk(args.y + offset, shared.v, pieces, valid);\n"
LOAD_ALL = """    if (chunk > 0) {
      load_backward_chunk(shared, args, pieces, pieces.of_chunk(chunk - 1), CHUNK);
    }
"""
STORE_ALL = "    store_backward_chunk(shared, args, pieces, pieces.of_chunk(chunk), valid);\n"

FAULTS = [
    Fault("ldmatrix address", "fragments.cuh", "lane % 16, lane / 16)", "lane % 16, lane / 8 % 2)"),
    Fault("ldmatrix row", "fragments.cuh", "lane % 16, lane / 16)", "lane % 8, lane / 16)"),
    Fault("transposed ldmatrix", "fragments.cuh", "lane / 8 % 2);", "lane / 16);"),
    Fault("tile swizzle", "fragments.cuh", "(piece ^ row % 8)", "(piece | row % 8)"),
    Fault("order of tokens", "fragments.cuh", "(i & 2) * 2", "(i & 2)"),
    Fault("order of the pieces", "fragments.cuh", "piece / 2 * 8 :", "piece / 2 * 6 :"),
    Fault("swizzle of the pieces", "fragments.cuh", "(place ^ piece / 2 * 4 * 16)", "place"),
    Fault("tail of the tiles", "fragments.cuh", "pieces.later(i) < valid);", "0 >= 0);"),
    Fault("tail of the output", "fragments.cuh", "pieces.later(i) < valid) {", "0 >= 0) {"),
    Fault("decay of the tail", "fragments.cuh", "pieces.later(i) >= valid", "0 < 0"),
    Fault("w copied too early", "forward.cuh", PREPARE, LOAD_W + PREPARE),
    Fault("r, k copied too early", "forward.cuh", BARRIER + LOAD_KEYS, LOAD_KEYS + BARRIER),
    Fault("v copied too early", "forward.cuh", STORE_Y + LOAD_V, LOAD_V + STORE_Y),
    Fault("inputs copied too early", "backward.cuh", STORE_ALL + LOAD_ALL, LOAD_ALL + STORE_ALL),
    Fault("copies at the end", "forward.cuh", "if (next_valid > 0) load_keys(", "load_keys("),
    Fault("tail of the second k", "backward_state.cuh", "row + token + p % 2 * 2 < valid", "true"),
    Fault("tokens of the second k", "backward_state.cuh", "(lane.row & 6) << 1", "(lane.row & 6)"),
    Fault("dA beside the scores", "backward.cuh", "chosen(place.below, as_", "chosen(true, as_"),
    Fault(
        "level of a pair", "block_gradients.cuh", "lane.row / 4 != lane.quad / 2", "lane.row > 15"
    ),
    Fault("place of G", "backward_state.cuh", "i / 2 % 4 * 2 + i / 8 % 2 +", "i / 2 % 4 * 2 +"),
    Fault("packed segment", "problem.cuh", "middle) <= segment", "middle) < segment"),
    Fault("heads that are cut", "problem.cuh", "cut ? segments.whole + (block", "cut ? (block"),
    Fault("sum of du", "sum.cuh", "head + segment * rest", "head + segment"),
    Fault("state of a segment", "segments.cuh", "added[i] = entering;", "added[i] = 0.0f;"),
    Fault("decay of the scan's tail", "scan.cuh", "NO_DECAY = -INFINITY", "NO_DECAY = 0.0f"),
    Fault("tail of the scan's output", "scan.cuh", "if (t0 + i < work.length)", "if (true)"),
    Fault("far leaves of level 8", "block.cuh", "odd == upper", "odd != upper"),
    Fault("pairs of level 4", "block.cuh", "row_leaf % 2 == 1 &&", "row_leaf > 0 &&"),
    Fault("decay inside a leaf", "block.cuh", "decayed *= d.x[c][a]", "decayed *= d.x[c][b]"),
    Fault(
        "inclusive suffix sum",
        "block_gradients.cuh",
        "through + suffix",
        "through + suffix + rdr[i]",
    ),
    Fault(
        "inclusive prefix sum",
        "block_gradients.cuh",
        "dw.x[c][i] += prefix",
        "dw.x[c][i] += prefix + kdk[i]",
    ),
    Fault("sum of a far leaf", "block_gradients.cuh", "lane.quad == 2 ?", "lane.quad == 3 ?"),
    Fault(
        "first of the scan's sums",
        "scan_backward.cuh",
        "dw.x[i] += prefix",
        "dw.x[i] += prefix * d.x[i]",
    ),
    Fault(
        "checkpoints of packed sequences",
        "problem.cuh",
        "CHUNK + sequence + skipped",
        "CHUNK + skipped",
    ),
    Fault(
        "last segment",
        "problem.cuh",
        "last = left <= longest && (left > 0 || first)",
        "last = left <= longest",
    ),
    Fault(
        "slot of a segment",
        "problem.cuh",
        "sequence * problem.H + head - whole;",
        "sequence * problem.H - whole;",
    ),
]

BLOCK, GRADIENTS, BACKWARD = "wkv7_block.cuh", "wkv7_gradients.cuh", "wkv7_backward.cuh"
FAULTS += [
    Fault("decay before a token", BLOCK, "before[0] = after[0], before", "before"),
    Fault("decay of the tail", BLOCK, "inside = first + t < valid", "inside = true"),
    Fault("triangle", BLOCK, "column < row + with_diagonal", "column <= row + with_diagonal"),
    Fault("sign of the solution", BLOCK, "c.x[t][i] += element", "c.x[t][i] -= element"),
    Fault("transposed solution", BLOCK, "c.x[s][i] += element", "c.x[s][i] -= element"),
    Fault("order of a solution", BLOCK, "from_last ? BLOCK - i : i", "i"),
    Fault("element of an operand", BLOCK, "column / 8 * 4", "column / 8 * 2"),
    Fault("row of an operand", BLOCK, "t / 8 * 2]", "t / 8]"),
    Fault("decay of the state", BLOCK, "{ s *= total[key]; }", "{ s *= total[0]; }"),
    Fault(
        "TK not transposed",
        "wkv7_forward.cuh",
        "transposed(shared.tk[block].load(lane))",
        "shared.tk[block].load(lane)",
    ),
    Fault("rt left out", "wkv7_forward.cuh", "= low_half(rt.pair[p])", "= 0.0f"),
    Fault("sum before a token", GRADIENTS, "before[3] = before[2] + x[2]", "before[3] = before[2]"),
    Fault("sum after a token", GRADIENTS, "after[0] = after[1] + x[1]", "after[0] = after[1]"),
    Fault("tokens of the second w", GRADIENTS, "t / 2 * 8 + t % 2", "t"),
    Fault("tail of the second w", GRADIENTS, "2 * lane.quad + token < valid", "0 == 0"),
    Fault("a read too early", GRADIENTS, "crossing[t] - read_before[t]", "crossing[t]"),
    Fault("what passes a block", GRADIENTS, "+= k_leaf.x[c][t] * dk.x[c][t] +", "+="),
    Fault("rows of the states", GRADIENTS, "{total[0], total[8]}", "{total[0], total[0]}"),
    Fault(
        "layout of checkpoints", GRADIENTS, "value * HEAD_SIZE + key]", "key * HEAD_SIZE + value]"
    ),
    Fault("AK not transposed", BACKWARD, "transposed(as_operand(of_a.k))", "as_operand(of_a.k)"),
    Fault("row of RB", BACKWARD, "rb->x[column][t]", "rb->x[t][column]"),
    Fault("diagonal of the pairs", BACKWARD, "lane.warp == YU || lane.warp == YV;", "false;"),
]


def all_faults() -> list[Fault]:
    """The listed ones, and one for each place of EVERYWHERE in the kernels."""
    faults = list(FAULTS)
    for file in KERNEL_FILES:
        text = (ROOT / "cuda" / "gpu" / file).read_text()
        for right, (kind, wrong) in EVERYWHERE.items():
            for count, match in enumerate(re.finditer(re.escape(right), text)):
                line = text[: match.start()].count("\n") + 1
                faults.append(Fault(f"{kind} in line {line}", file, right, wrong, count))
    return faults


def copy_sources(folder: Path) -> None:
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    shutil.copytree(ROOT / "tests/ops/wkv6/emulation", folder / "tests/ops/wkv6/emulation")
    shutil.copytree(ROOT / "tests/helpers", folder / "tests/helpers")
    for name in (*TESTS.values(), "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def tests_pass(test: Path, fault: Fault | None) -> bool:
    """Whether the emulated tests of the sources with this fault pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        if fault is not None:
            fault.apply(folder)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", str(test)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    # 0: all passed. 1: a test failed, or the kernels did not compile. Negative: ended by a signal,
    # after a write outside a tensor. Anything else is a fault of this script.
    assert result.returncode <= 1, result.stdout + result.stderr
    assert "CalledProcessError" not in result.stdout, f"does not compile: {result.stdout}"
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="run the faults whose name or file contains this"
    )
    only = parser.parse_args().only
    faults = [fault for fault in all_faults() if only in f"{fault.file} {fault.name}"]
    for test in {fault.test for fault in faults}:
        assert tests_pass(test, None), f"{test} fails without any fault"
    missed = 0
    for fault in faults:
        noticed = not tests_pass(fault.test, fault)
        missed += not noticed
        print(f"{'noticed' if noticed else 'MISSED '}  {fault.file:18} {fault.name}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    run_cli(main)
