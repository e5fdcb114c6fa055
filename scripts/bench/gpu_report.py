"""One JSON and one Markdown file from the logs that the stages of scripts/gpu_check.sh left.

Stages that FOLDER has from an earlier run stay unless they ran again.

python scripts/bench/gpu_report.py LOGS FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

from finchtune.errors import UserError, run_cli
from finchtune.files import atomic_path, read_json, write_json

# Table 6 of arXiv 2409.15371: RWKV6-3B, batch 1, 512 tokens; its Bat builds the changed weight.
PAPER = {
    "lora": "12,074 MB, 3.62 kt/s",
    "bone": "11,052 MB, 3.99 kt/s",
    "bat": "22,978 MB, 2.16 kt/s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", type=Path)
    parser.add_argument("folder", type=Path, help="where both files go")
    given = parser.parse_args()
    if not (given.logs / "stages.tsv").exists():
        raise UserError(f"{given.logs} has no stages.tsv: run scripts/gpu_check.sh")
    found, folder = collect(given.logs), given.folder
    results = folder / "gpu_check.json"
    if results.exists():
        found = read_json(results) | found
    write_json(results, found)
    with atomic_path(folder / "gpu_check.md") as temporary:
        temporary.write_text("\n".join(markdown(found)) + "\n")


def collect(logs: Path) -> dict[str, Any]:
    """Every stage: exit status, seconds, the figures it wrote, the end of what it said."""
    found = {}
    for text in (logs / "stages.tsv").read_text().splitlines():
        name, status, seconds = text.split("\t")
        log = (logs / f"{name}.log").read_text(errors="replace")
        stage: dict[str, Any] = {"status": status, "seconds": int(seconds), "said": log[-20000:]}
        figures = logs / f"{name}.json"
        if figures.exists():
            stage["figures"] = read_json(figures)
        found[name] = stage
    return found


def markdown(found: dict[str, Any]) -> list[str]:
    """Three tables: the stages, WKV6 and WKV7, training steps."""
    lines = ["| stage | status | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {x['status']} | {x['seconds']} |" for name, x in found.items()]
    lines += ["", *wkv_table(found), "", *steps_table(found)]
    for name, stage in found.items():
        if "generation" in stage.get("figures", {}):
            speeds = stage["figures"]["generation"]
            lines += ["", f"{name}: " + ", ".join(f"{k} {v:.0f}" for k, v in speeds.items())]
    return lines


def wkv_table(found: dict[str, Any]) -> list[str]:
    lines = ["| operator | B,T,H,N | pass | form | ms | GB/s | of bound |", "|" + "---|" * 7]
    stages = [found.get(name, {}).get("figures", {}) for name in ("wkv6", "wkv7")]
    for x in (x for figures in stages for x in figures.get("results", [])):
        shape = ",".join(map(str, x["shape"]))
        lines.append(
            f"| {x['operator']} | {shape} | {x['pass']} | {x['form']} | {x['ms']:.3f} "
            f"| {x['gb_per_s']:.0f} | {x['of_bound']:.0%} |"
        )
    return lines


def steps_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| size | method | quant | grad_cp | graphs | B x T | step ms | tokens/s | products | MFU "
        "| peak MiB | planned MiB | held MiB | launches | kernels | paper |",
        "|" + "---|" * 16,
    ]
    for name, stage in found.items():
        for x in stage.get("figures", {}).get("rows", []):
            head = (
                f"| {x['size']} | {x['peft']} | {x['quant'] or 'none'} | {x['grad_cp']} "
                f"| {x['graphs']} | {x['micro_bsz']} x {x['ctx_len']} | "
            )
            paper = PAPER.get(x["peft"], "") if name == "table6" else ""
            if "error" in x:
                lines.append(head + f"{x['error'][:60]} | | | | | | | | | {paper} |")
                continue
            lines.append(
                head + f"{x['step_ms']:.1f} | {x['tokens_per_s']:.0f} | {x['products_share']:.0%} "
                f"| {x['mfu']:.0%} | {x['peak_mib']:.0f} | {x['planned_mib']:.0f} "
                f"| {x['held_mib']:.0f} | {x['launches']} | {x['kernels']} | {paper} |"
            )
    return lines


if __name__ == "__main__":
    run_cli(main)
