"""Attack finchtune and print what held: changed files of every kind, system faults, kills.

    python scripts/reliability                # everything; the table of docs/reliability.md
    python scripts/reliability --cases 100    # a sample of it, in about half a minute

Every case either is read rightly or ends in one line and an exit status: no traceback, no hang, no
silent acceptance, nothing half-written. What does not hold is printed, and the exit status is 1.
The same --seed makes the same cases.
"""

import argparse
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from data import DATA
from faults import FAULTS
from harness import Case, good_outputs, import_all, judge
from kills import KILLS
from runs import RUNS
from samples import make_samples
from weights import WEIGHTS

Makers = tuple[Callable[[random.Random, int], Iterator[Case]], ...]
MAKERS: Makers = (*WEIGHTS, *RUNS, *DATA, *FAULTS)
CHANGES = 6  # of each sort and file
KILLS_OF_ALL = 3200  # changes of files at which a writer can be killed


class Tally:
    """Kind of case -> how many were tried, and how many held."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.faults: list[str] = []

    def add(self, kind: str, name: str, fault: str | None) -> None:
        """Count a case; print one that did not hold."""
        tried = self.counts.setdefault(kind, [0, 0])
        tried[0] += 1
        tried[1] += fault is None
        if fault:
            self.faults.append(f"{kind}: {name}: {fault}")
            print(ascii(self.faults[-1])[1:-1], file=sys.stderr, flush=True)

    def table(self) -> str:
        """Markdown."""
        rows = [f"| {kind} | {tried:,} | {held:,} |" for kind, (tried, held) in self.counts.items()]
        return "\n".join(("| kind | tried | held |", "|---|---|---|", *rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, help="a sample of about so many cases [all]")
    parser.add_argument("--seed", type=int, default=0, help="chooses the changes [0]")
    parser.add_argument("--only", default="", help="kinds that have this in their name")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the commands run in forks of this process
    began = time.monotonic()
    import_all()
    tally, every = Tally(), max(1, KILLS_OF_ALL // given.cases) if given.cases else 1
    with tempfile.TemporaryDirectory(prefix="reliability-") as place:
        samples = make_samples(Path(place, "good"))
        for case in chosen_cases(given.cases, given.seed, given.only):
            tally.add(case.kind, case.name, judge(case, wanted(case, samples), samples))
        for kills in KILLS if given.only in "killed" else ():
            for kind, name, fault in kills(samples, every):
                tally.add(kind, name, fault)
    print(tally.table())
    tried = sum(one for one, _ in tally.counts.values())
    print(f"\n{tried:,} cases, {len(tally.faults):,} faults, {time.monotonic() - began:.0f} s")
    return 1 if tally.faults else 0


def chosen_cases(sample: int | None, seed: int, only: str) -> Iterator[Case]:
    """All cases, or a few of each maker."""
    for maker in MAKERS:
        rng = random.Random(zlib.crc32(maker.__name__.encode()) + seed)
        cases = [case for case in maker(rng, CHANGES) if only in case.kind]
        if sample and len(cases) > (share := max(1, sample // len(MAKERS))):
            cases = rng.sample(cases, share)
        yield from cases


GOOD: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, str]] = {}


def wanted(case: Case, samples: Path) -> dict[str, str]:
    """What the case's command writes of unchanged files; made once for each command."""
    if not case.outputs:
        return {}
    key = case.command, case.outputs
    if key not in GOOD:
        GOOD[key] = good_outputs(case, samples)
    return GOOD[key]


if __name__ == "__main__":
    sys.exit(main())
