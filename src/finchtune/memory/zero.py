"""What DeepSpeed's ZeRO allocates beside the model's own activations, buffer by buffer.

Every term is a tensor that the pinned version's stage_1_and_2.py or stage3.py makes, in one case
torch's gloo backend; scripts/bench/check_plan.py holds the sums against what is really allocated.
"""

from dataclasses import dataclass, field

import torch

from finchtune.models import LanguageModel

REDUCE_BUCKET = 50_000_000  # elements of gradient that ranks exchange at once
LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PREFETCH_ELEMENTS = 50_000_000  # its stage3_prefetch_bucket_size
PERSISTENT_ELEMENTS = 100_000  # its stage3_param_persistence_threshold
NORM_BYTES = 8  # norms of gradients are taken in float64, one tensor at a time

Parts = dict[str, int]


@dataclass(frozen=True)
class ZeroState:
    """Bytes of one device: `standing` always, on top of it the other parts at moments of a step.

    `exchange` is when gradients are reduced: amid the backward if `exchanges_early`, else when
    the activations are gone. `host` is what offloading moves away from the device.
    """

    standing: Parts
    host: int = 0
    exchanges_early: bool = False
    forward: Parts = field(default_factory=dict)
    loss: Parts = field(default_factory=dict)
    backward: Parts = field(default_factory=dict)
    backward_end: Parts = field(default_factory=dict)
    exchange: Parts = field(default_factory=dict)
    norm: Parts = field(default_factory=dict)
    update: Parts = field(default_factory=dict)


def effective_stage(stage: int, dtype: torch.dtype, accumulates: bool) -> tuple[int, bool]:
    """(the stage that DeepSpeed runs, whether gradients are summed in fp32).

    In bf16 a sum of many gradients would stop growing long before it is complete. At stage 1
    DeepSpeed has another optimizer for fp32 sums; stage 2's differs from stage 1 in nothing else
    than reducing gradients once for each micro batch.
    """
    sums_in_fp32 = accumulates and dtype == torch.bfloat16 and stage > 0
    return (max(2, stage) if sums_in_fp32 else stage), sums_in_fp32


class Zero:
    """ZeRO `stage` 0 to 3 of a model whose parameters have `dtype`, among `world` devices.

    Stage 1 shards fp32 master weights and Adam's two moments among them, 2 the gradients too, 3 the
    weights too. `on_gpu`: gradients are exchanged during backward, from two buffers in turn.
    `accumulates`: over several micro batches, in bf16 as `Engine` has it, in fp32 sums and with
    stage 2 at least.
    """

    def __init__(
        self,
        model: LanguageModel,
        dtype: torch.dtype,
        stage: int,
        world: int = 1,
        offload: bool = False,
        on_gpu: bool = False,
        accumulates: bool = False,
    ):
        self.model, self.world, self.offload = model, world, offload
        self.on_gpu, self.accumulates = on_gpu, accumulates
        self.width = dtype.itemsize
        self.stage, self.sums_in_fp32 = effective_stage(stage, dtype, accumulates)
        numels = [p.numel() for p in model.parameters() if p.requires_grad]
        self.trained = sum(numels)
        self.shard = -(-self.trained // world) if stage else self.trained
        self.largest = max(numels, default=0)
        self.piece = min(self.largest, self.shard)
        self.bucket = self.width * min(self.trained, REDUCE_BUCKET)
        self.many_buckets = self.trained > REDUCE_BUCKET
        # What the optimizer reads: an fp32 copy of the gradients' shard, made from a flat one.
        self.flat = self.width * self.shard
        self.master_gradients = 4 * self.shard if self.width < 4 else 0

    def state(self) -> ZeroState:
        """What there is at each moment of a step."""
        if self.stage == 0:
            return self.replicated()
        return self.replicated_weights() if self.stage < 3 else self.sharded_weights()

    def replicated(self) -> ZeroState:
        """Plain data parallelism."""
        gradients = {"gradients": self.width * self.trained}
        between = gradients if self.accumulates else {}
        return ZeroState(
            {
                "weights": tensor_bytes(self.model),
                "master weights": self.master_gradients,
                "moments": 8 * self.trained,
            },
            forward=between,
            loss=between,
            backward=between,
            backward_end=gradients,
            update=gradients | {"update": self.master_gradients},
        )

    def replicated_weights(self) -> ZeroState:
        """Stages 1 and 2, as stage_1_and_2.py has them."""
        # Without overlap stage 1 exchanges gradients when all are there, else as they come.
        waits = self.stage == 1 and not (self.on_gpu and not self.accumulates)
        # averaged_gradients; offloaded ones go straight to the host, except sums in fp32.
        held = 0 if self.offload else self.flat
        held = 4 * self.shard if self.sums_in_fp32 else held
        all_gradients = self.width * self.trained
        between = (all_gradients if waits else held) if self.accumulates else 0
        buckets = self.bucket * (2 if self.on_gpu else 1)
        copies = 0 if self.offload or self.sums_in_fp32 else self.flat + self.master_gradients
        standing = {"weights": tensor_bytes(self.model)}
        if self.offload:
            standing["staging"] = self.width * self.largest  # temp_grad_buffer_for_gpu_offload
        else:
            standing |= {"master weights": 4 * self.shard, "moments": 8 * self.shard}
        return ZeroState(
            standing,
            self.host_of_replicated_weights() if self.offload else 0,
            self.many_buckets and not waits,
            forward={"gradients": between},
            loss={"gradients": between},
            backward={"gradients": between, "buffers": buckets},
            backward_end={"gradients": all_gradients if waits else between, "buffers": buckets},
            exchange=self.exchange_of_replicated_weights(
                all_gradients - self.bucket if waits else between, held, buckets
            ),
            norm={"gradients": held, "update": NORM_BYTES * self.piece},
            update={"gradients": held, "update": copies},
        )

    def host_of_replicated_weights(self) -> int:
        """Master weights, their gradients and moments, and buffers on the way there and back."""
        # param_buffer_of_bit16_for_cpu_offload_groups, temp_grad_buffer_for_cpu_offload
        host = 16 * self.shard + self.flat + self.width * self.largest
        accumulated = self.accumulates and not self.sums_in_fp32  # accumulated_grads_in_cpu
        return host + (self.flat if accumulated else 0)

    def exchange_of_replicated_weights(self, before: int, held: int, buckets: int) -> Parts:
        """`before` bytes of gradients are there already, `held` are there afterwards."""
        # allreduce_bucket flattens slices of several ranks into a copy of the bucket.
        copy = self.bucket if self.world > 1 else 0
        if self.offload:
            copy = max(copy, NORM_BYTES * self.piece)
        if self.sums_in_fp32:
            # Kept already while slices of the copy are added to it, each as fp32.
            return {"gradients": held, "buffers": buckets + copy + 4 * self.piece}
        # The copy of a bucket that holds all gradients is freed before they are stored.
        extra = copy if self.many_buckets else max(0, copy - held)
        return {"gradients": before + held, "buffers": buckets + extra}

    def sharded_weights(self) -> ZeroState:
        """Stage 3, as stage3.py and partition_parameters.py have it."""
        numels = [p.numel() for p in self.model.parameters()]
        small = sum(n for n in numels if n <= PERSISTENT_ELEMENTS)
        large = sum(numels) - small
        embedding = self.model.emb.weight.numel()
        embedding *= embedding > PERSISTENT_ELEMENTS
        if self.world == 1 and not (self.offload and self.on_gpu):
            small = large = embedding = 0  # nothing is gathered where one device has everything
        shard = self.width * -(-sum(numels) // self.world)
        # Gathered weights stay until backward, but a frozen embedding is not used there again.
        read_again = self.model.emb.weight.requires_grad
        gathered = self.width * min(large - (0 if read_again else embedding), LIVE_ELEMENTS)
        last = self.width * embedding if read_again else 0
        # reduce_scatter_coalesced reorders the bucket into a copy; gloo takes another.
        copies = self.bucket * (1 if self.on_gpu else 2)
        gradients = (4 if self.sums_in_fp32 else self.width) * self.shard
        norm = NORM_BYTES * -(-self.piece // self.world)
        standing = {
            "weights": self.width * small + sum(t.nbytes for t in self.model.buffers()),
            "reduce bucket": self.bucket,
        }
        host = 0
        if self.offload:
            # The shard of all weights; master weights, their gradients and moments; gradients.
            host = shard + 16 * self.shard + gradients
        else:
            standing["weights"] += shard
            standing |= {"master weights": 4 * self.shard, "moments": 8 * self.shard}
            standing["gradients"] = gradients  # grad_partitions_flat_buffer
        copies_of_shard = gradients + (0 if self.sums_in_fp32 else self.master_gradients)
        return ZeroState(
            standing,
            host,
            self.many_buckets,
            # Copies are taken out of the buffer that was gathered into, which lives as long
            # as one of its weights was not used.
            forward={"gathered": gathered + self.width * min(large, PREFETCH_ELEMENTS)},
            loss={"gathered": gathered},
            backward={"gathered": gathered},
            backward_end={"gathered": last},
            exchange={"gathered": gathered if self.many_buckets else last, "buffers": copies},
            norm={"update": norm},
            update={"update": 0 if self.offload else copies_of_shard},
        )


def tensor_bytes(model: LanguageModel) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
