"""What saving takes of memory, under every ZeRO stage."""

import json
import sys

import pytest
import torch
from helpers.support import save_model, small_model

from finchtune.distributed.launch import run_processes
from finchtune.files import sha256

# One step of full tuning, then both files, and the memory that each took beside the training's.
PROGRAM = """
import json, sys, threading
from pathlib import Path
import torch
from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.training.engine import Engine
from finchtune.training.saver import Saver
from finchtune.training.setup import build_model, open_data

folder, stage = Path(sys.argv[1]), sys.argv[2]

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def peak_of(work):
    peaks, done = [anonymous()], threading.Event()
    def watch():
        while not done.wait(0.001):
            peaks.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    distributed.barrier()
    return max(peaks) - peaks[0]

distributed.init_process_group(torch.device("cpu"))
config = TrainConfig(load_model=str(folder / "base.pth"), data_file=str(folder / "d.jsonl"),
                     data_type="jsonl", tokenizer="bytes", ctx_len=16, proj_dir=str(folder),
                     strategy=f"deepspeed_stage_{stage}")
model = build_model(config, torch.float32, torch.device("cpu"))
engine = Engine(model, config, torch.device("cpu"))
tokens = torch.ones(1, 16, dtype=torch.int64)
engine.step([Batch(tokens, tokens)], 1e-3)
run = Saver(config, engine, open_data(config, 65536), {})
taken = [peak_of(lambda: run.save_checkpoint(1, {})), peak_of(lambda: run.save_epoch(0, 1))]
(folder / f"taken-{distributed.rank()}.json").write_text(json.dumps(taken))
distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saving_takes_the_memory_of_a_few_tensors(tmp_path, stage):
    """Of L6 C256 V65536, 39 million parameters; both moments and the weights are 451 MiB."""
    model = small_model(n_layer=6, n_embd=256, vocab_size=65536, head_size=64)
    save_model(model, tmp_path / "base.pth")
    (tmp_path / "d.jsonl").write_text('{"text": "some words"}\n')
    assert run_processes(2, ["-c", PROGRAM, str(tmp_path), str(stage)]) == 0
    largest = max(p.nbytes for p in model.parameters())
    for rank in (0, 1):
        taken = json.loads((tmp_path / f"taken-{rank}.json").read_text())
        checkpoint, epoch = (n_bytes / 2**20 for n_bytes in taken)
        print(
            f"stage {stage} rank {rank}: +{checkpoint:.0f} MiB for a checkpoint, "
            f"+{epoch:.0f} for rwkv-0.pth; the largest tensor has {largest / 2**20:.0f}"
        )
        assert max(taken) < 3.5 * largest
    manifest = json.loads((tmp_path / "checkpoints/step-1/manifest.json").read_text())
    assert manifest["sha256"]["state.pth"] == sha256(tmp_path / "checkpoints/step-1/state.pth")
    state = torch.load(tmp_path / "checkpoints/step-1/state.pth", weights_only=True, mmap=True)
    trained = torch.load(tmp_path / "rwkv-0.pth", weights_only=True, mmap=True)
    assert list(trained) == list(model.state_dict())
    for name, tensor in trained.items():
        assert torch.equal(tensor, state["trained"][name]), name
        assert state["exp_avg"][name].shape == state["exp_avg_sq"][name].shape == tensor.shape
