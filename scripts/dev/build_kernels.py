"""Compile the kernels for several types of device at the same time, and say how that went.

python scripts/dev/build_kernels.py cpu cuda
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from finchtune.errors import run_cli
from finchtune.files import cache_folder
from finchtune.ops.kernels.build import CPU, GPU, load_part
from finchtune.ops.kernels.toolkit import BuildError, find_toolkit

DEVICES = {"cpu": CPU, "cuda": GPU}


def build(device: str) -> tuple[str, str | None]:
    """Seconds spent, and why it failed or None."""
    began, failure = time.perf_counter(), None
    try:
        toolkit = find_toolkit() if device == "cuda" else None
        load_part(DEVICES[device], toolkit, cache_folder())
    except BuildError as error:
        failure = str(error)
    return f"{time.perf_counter() - began:.1f} s", failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="+", choices=DEVICES)
    devices = parser.parse_args().devices
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(devices), mp_context=spawn) as processes:
        outcome = dict(zip(devices, processes.map(build, devices), strict=True))
    for device, (seconds, failure) in outcome.items():
        print(f"{device}: {failure or 'loaded'}, {seconds}")
    return int(any(failure for _, failure in outcome.values()))


if __name__ == "__main__":
    run_cli(main)
