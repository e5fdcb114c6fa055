"""DeepSpeed: how it is configured, started, stepped, and how its sharded state is read and set.

Everything here that touches DeepSpeed's internals was checked against the pinned version.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from finchtune import distributed
from finchtune.adapters.state import is_adapter_tensor
from finchtune.config import TrainConfig
from finchtune.data import Batch, Data
from finchtune.memory.zero import REDUCE_BUCKET, effective_stage
from finchtune.models import LanguageModel
from finchtune.models.graphed_blocks import cuda_graphs
from finchtune.ops.cross_entropy import IGNORE
from finchtune.training.deepspeed import start_deepspeed
from finchtune.training.metrics import peak_memory_mb
from finchtune.training.optim import adamw, parameter_groups, set_learning_rate
from finchtune.training.passes import SummedLoss, make_passes

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


@dataclass
class StepResult:
    """One optimizer step, over all ranks: mean loss per unmasked token, and counts."""

    loss: float
    grad_norm: float
    tokens: int  # positions fed to the model, padding included
    targets: int  # unmasked tokens
    skipped: bool  # the gradient was not finite: nothing was updated
    stopping: bool  # some rank asked to stop

    def measured(self, seconds: float) -> dict[str, float]:
        """What metrics.jsonl says of a step that took so long."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / seconds,
            "memory_mb": peak_memory_mb(),
            "seconds": seconds,
        }


def full_parameter_like(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """What `Engine.full_parameter` returns, on the meta device, also of a sharded parameter."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.empty(shape, dtype=dtype, device="meta")


class Engine:
    """A model under DeepSpeed's ZeRO: forward, backward and step, and its whole training state."""

    def __init__(self, model: LanguageModel, config: TrainConfig, device: torch.device):
        groups = parameter_groups(
            model.named_parameters(),
            config.weight_decay,
            config.decay_adapters,
            model.doubled_lr if config.layerwise_lr else "",
            config.lora_plus_ratio,
            config.state_lr / config.lr_init if config.trains_state else 1.0,
        )
        betas = (config.beta1, config.beta2)
        optimizer = adamw(groups, config.lr_init, betas, config.adam_eps)
        self.model, self.device = model, device
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.accumulate = config.accumulate_grad_batches
        self.stage = config.stage
        self.sharing = config.context_parallel
        self.means = config.loss_mean == "micro_batches"
        module = SummedLoss(model, config.l2wrap)
        timeout = timedelta(minutes=config.timeout_minutes)
        self.ds = start_deepspeed(module, optimizer, self._ds_config(config), device, timeout)
        self.passes = make_passes(self.ds, model, config, device)
        model.graphs = cuda_graphs(device) if config.cuda_graphs else None
        self.readers = config.readers(distributed.world_size())
        self._make_moments()

    def _ds_config(self, config: TrainConfig) -> dict[str, Any]:
        dtype = next(self.model.parameters()).dtype
        trained = sum(p.numel() for p in self.trained.values())
        accumulates = config.accumulates
        stage, sums_in_fp32 = effective_stage(config.stage, dtype, accumulates)
        on_gpu = self.device.type == "cuda"
        memory = {"device": "cpu" if config.offload else "none", "pin_memory": on_gpu}
        return {
            "train_micro_batch_size_per_gpu": config.micro_bsz,
            "gradient_accumulation_steps": config.accumulate_grad_batches,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            **({"data_types": {"grad_accum_dtype": "fp32"}} if sums_in_fp32 else {}),
            # torch's fused AdamW runs on a CPU too, without half a minute of compiling.
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                # DeepSpeed's default of half a billion elements would be allocated in any case.
                "reduce_bucket_size": min(REDUCE_BUCKET, trained),
                "overlap_comm": on_gpu,
                "offload_optimizer": memory,
                **({"offload_param": memory} if config.stage == 3 else {}),
            },
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "steps_per_print": 2**31,
        }

    def step(self, micro_batches: list[Batch], lr: float, stop: bool = False) -> StepResult:
        """One optimizer step over this rank's micro batches.

        The loss is the mean over the unmasked tokens of all ranks and micro batches together, or,
        where --loss_mean asks for it, the mean of the micro batches' means.
        Where it or the gradient's norm is not finite on any rank, no rank updates anything.
        `stop`: this rank wants to stop; the result tells every rank whether one does.
        """
        world = distributed.world_size()
        valid = [int((batch.labels != IGNORE).sum()) for batch in micro_batches]
        counts = self.upload([sum(valid), sum(b.tokens.numel() for b in micro_batches), stop])
        # Processes that share a context count its labels each.
        targets = distributed.sum_in_place(counts)[0] / self.sharing
        # DeepSpeed averages over ranks and micro batches. That is the mean of their means, and
        # from their sums this makes the mean over all tokens.
        means = torch.full_like(targets, self.readers * self.accumulate)
        count = means if self.means else targets.clamp(min=1)
        scale = world * self.accumulate / count
        weights = [1 / max(1, n) if self.means else 1.0 for n in valid]
        set_learning_rate(self.ds.optimizer.param_groups, lr)
        loss_sum = self.passes.backward(micro_batches, weights, scale)
        zero = self.ds.optimizer
        if zero.overflow and self.stage < 3:
            # Under offload DeepSpeed 0.19 would add the next gradient to the bad one.
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        norm = self.ds.get_global_grad_norm()
        norm = norm.double() if isinstance(norm, Tensor) else self.upload(norm)
        loss = distributed.sum_in_place(loss_sum) / count
        # The only values that this waits for, once all of the step's work is queued.
        told = torch.stack([loss, norm.to(self.device), targets, *counts[1:]]).tolist()
        return StepResult(
            loss=told[0],
            grad_norm=told[1],
            targets=int(told[2]),
            tokens=int(told[3] / self.sharing),
            skipped=bool(zero.overflow),
            stopping=told[4] > 0,
        )

    def upload(self, values: float | Sequence[float]) -> Tensor:
        """Numbers on the device, in float64, without waiting for what is queued there."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.device.type != "cuda":
            return numbers.to(self.device)
        return numbers.pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def evaluate(self, data: Data, micro_bsz: int) -> float:
        """Mean loss per unmasked token over every row of `data`, read once by all ranks together.

        Without dropout. A collective call; the same on all ranks.
        """
        self.ds.eval()
        loss_sum = valid = 0.0
        reader = distributed.rank() // self.sharing
        for batch in data.every_row(reader, self.readers, micro_bsz):
            loss_sum += self.passes.loss(batch).item()
            valid += int((batch.labels != IGNORE).sum())
        self.ds.train()
        loss_sum, targets = distributed.all_sum([loss_sum, valid], self.device)
        return loss_sum / max(1.0, targets / self.sharing)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the model is a plain module again."""
        self.model.graphs = None
        self.ds.destroy()

    def full_parameter(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """A trained parameter, or one of its Adam moments, whole, in fp32, on the CPU.

        A collective call under ZeRO; the same on all ranks.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            return safe_get_full_fp32_param(parameter).cpu()
        return safe_get_full_optimizer_state(parameter, moment).cpu()

    def state(self) -> tuple[dict[str, Any], Iterator[Tensor]]:
        """Everything that resuming needs, whatever the ZeRO stage and number of ranks.

        First its layout, {"exp_avg": {name: tensor}, "exp_avg_sq": {...}, "trained": {...},
        "frozen": {...}, "adam_step": int}, whose tensors are on the meta device. Second an iterator
        that yields them in this order, whole, on the CPU. Each is gathered when it is its turn, a
        collective call: every rank must exhaust the iterator, in step.
        """
        # Buffers that adapters drew at random (PiSSA's first A and B) are part of the state too.
        frozen = {n: b for n, b in self.model.named_buffers() if is_adapter_tensor(n)}
        layout: dict[str, Any] = {
            part: {name: full_parameter_like(p, torch.float32) for name, p in self.trained.items()}
            for part in (*MOMENTS, "trained")
        }
        layout["frozen"] = {name: buffer.to("meta") for name, buffer in frozen.items()}
        layout["adam_step"] = int(self._moments()[0]["step"])
        if self.ds.fp16_enabled():
            layout["loss_scale"] = dict(vars(self.ds.optimizer.loss_scaler))

        def tensors() -> Iterator[Tensor]:
            for moment in (*MOMENTS, None):
                for parameter in self.trained.values():
                    yield self.full_parameter(parameter, moment)
            for buffer in frozen.values():
                yield buffer.cpu()

        return layout, tensors()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state, its layout filled with tensors, under any ZeRO stage, number of ranks.

        The model's parameters must hold state["trained"] already, since DeepSpeed copied them.
        """
        for flat in self._moments():
            flat["step"].fill_(state["adam_step"])
        for name, parameter in self.trained.items():
            self._set_whole(parameter, state["trained"][name], None)
            for moment in MOMENTS:
                self._set_whole(parameter, state[moment][name], moment)
        if "loss_scale" in state:
            vars(self.ds.optimizer.loss_scaler).update(state["loss_scale"])

    def _make_moments(self) -> None:
        """Make AdamW's state, which it would make itself in its first step.

        DeepSpeed 0.19 looks for it as soon as the first of several groups has taken that step, and
        would miss the moments of the others for good.
        """
        zero = self.ds.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            step = torch.tensor(0.0, device=flat.device)
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": step, **moments}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _moments(self) -> list[dict[str, Tensor]]:
        """AdamW's state of this rank: its step count and moments for each flat tensor."""
        return list(self.ds.optimizer.optimizer.state.values())

    def _set_whole(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Copy this rank's share of a whole tensor into the sharded state."""
        from deepspeed import utils

        value = value.to(self.device, torch.float32)
        if self.stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # ZeRO-3 cuts the flat tensor into equal shares, the last one padded.
        share = -(-value.numel() // distributed.world_size())
        padded = torch.nn.functional.pad(value.flatten(), (0, share * distributed.world_size()))
        mine = padded.narrow(0, share * distributed.rank(), share)
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, mine)
        else:
            utils.safe_set_local_optimizer_state(parameter, mine, moment)
