"""How a run starts: one copy of the frozen weights in a machine, equal numbers on every rank."""

import json

import pytest
import torch
from helpers.support import small_model

from finchtune import distributed
from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.distributed.launch import run_processes
from finchtune.memory.estimate import StorageCount
from finchtune.training.deepspeed import checksum
from finchtune.training.engine import Engine
from finchtune.weights.tensors import write_tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_weights_have_no_master_and_no_gradient(stage):
    """All that DeepSpeed and a step leave in memory is what the trained parameters take."""
    distributed.init_process_group(CPU)
    model = attach(small_model(n_layer=3, n_embd=128).bfloat16(), "bone", r=8).bfloat16()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen > 20 * trained
    strategy = f"deepspeed_stage_{stage}"
    config = TrainConfig(load_model="m", data_file="d", micro_bsz=2, strategy=strategy)
    tokens = torch.randint(1, 256, (2, 16))
    with StorageCount() as count:
        for parameter in model.parameters():
            count.add(parameter)
        engine = Engine(model, config, CPU)
        engine.step([Batch(tokens, tokens)], 1e-3)
    master_weights, moments, gradients = 4 * trained, 8 * trained, 2 * trained
    least = 2 * (trained + frozen) + master_weights + moments
    assert least <= count.live <= least + 4 * gradients
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    engine.close()
    distributed.shutdown()


def test_a_checksum_sees_every_number():
    for tensor in (torch.randn(6, 8), torch.randn(5).bfloat16(), torch.tensor(3.0)):
        for index in range(tensor.numel()):
            other = tensor.clone()
            other.view(-1)[index] += 1
            assert checksum(other) != checksum(tensor)
        assert checksum(tensor.clone()) == checksum(tensor)


# Starts as train.py does; says what memory the model took, in parts of all processes (Pss).
PROGRAM = """
import json, sys
import torch
from pathlib import Path
from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.training.engine import Engine
from finchtune.errors import run_cli
from finchtune.training.setup import build_model

folder, settings, change = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
device = torch.device("cpu")

def proportional():
    distributed.barrier()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Pss:"))
    distributed.barrier()
    return int(line.split()[1]) * 1024

def main():
    import deepspeed
    distributed.init_process_group(device)
    base = str(folder / "base.pth")
    config = TrainConfig(load_model=base, data_file="d", grad_cp=0, **settings)
    before = proportional()
    model = build_model(config, torch.float32, device)
    if distributed.rank() == 1:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if change and change in name:
                    tensor[0] += 1
    engine = Engine(model, config, device)
    tokens = torch.ones(1, 16, dtype=torch.int64)
    for _ in range(2):
        engine.step([Batch(tokens, tokens)], 1e-3)
    taken = proportional() - before
    assert "torch._dynamo" not in sys.modules, "a second of every start"
    sums = {name: float(t.double().sum()) for name, t in model.named_buffers()}
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps([taken, sums]))
    distributed.shutdown()

run_cli(main)
"""


def start(folder, processes, settings, change=""):
    """Start so many ranks; their exit status, what each took and its buffers' sums."""
    command = ["-c", PROGRAM, str(folder), json.dumps(settings), change]
    status = run_processes(processes, command)
    if status:
        return status, [], []
    told = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    return status, [taken for taken, _ in told], [sums for _, sums in told]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of 40 million parameters in float32, and one in bfloat16, by dtype."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        made[dtype] = tmp_path_factory.mktemp("base")
        model = small_model(n_layer=2, n_embd=512, vocab_size=32768, head_size=64)
        weights = {name: t.to(dtype) for name, t in model.state_dict().items()}
        write_tensors(weights, made[dtype] / "base.pth")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_processes_share_one_copy_of_the_frozen_weights(folders, dtype, stage):
    """The weights are held in float32; a file in bfloat16 is converted for both."""
    settings = {"peft": "bone", "bone_r": 8, "strategy": f"deepspeed_stage_{stage}"}
    weights = 4 * sum(p.numel() for p in torch.load(folders[dtype] / "base.pth").values())
    taken = {n: sum(start(folders[dtype], n, settings)[1]) for n in (1, 2)}
    print(f"{weights / 2**20:.1f} MiB of weights; one process takes {taken[1] / 2**20:.1f}, "
          f"two together {taken[2] / 2**20:.1f}")  # fmt: skip
    assert taken[1] > 0.9 * weights
    assert taken[2] < taken[1] + 0.5 * weights


@pytest.mark.slow
def test_ranks_start_alike_or_not_at_all(folders, capfd):
    """What adapters computed becomes rank 0's; other weights than rank 0's are refused."""
    settings = {"peft": "pissa", "pissa_r": 4}
    _, _, (first, second) = start(folders[torch.float32], 2, settings, "init_lora_A")
    assert first == second
    assert len(first) == 32
    status, _, _ = start(folders[torch.float32], 2, settings, "blocks.1.att.key.weight")
    assert status == 2
    error = capfd.readouterr().err
    assert "rank 1 has other weights than rank 0 (blocks.1.att.key.weight and 0 more)" in error
