"""A run's folder: what may start or go on in it, and what is saved there."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune import distributed
from finchtune.adapters import adapted_layers, attach, start_from_gradients
from finchtune.config import TrainConfig
from finchtune.data import Data, load_data
from finchtune.errors import UserError
from finchtune.files import sha256, write_json
from finchtune.models.rwkv6 import RWKV6
from finchtune.ops.cross_entropy import IGNORE
from finchtune.tokenizer import load_tokenizer
from finchtune.training.checkpoints import load_checkpoint, save_checkpoint
from finchtune.training.engine import Engine, whole_like
from finchtune.training.metrics import Metrics
from finchtune.training.run_folder import clean_folder
from finchtune.weights.adapter_files import FORMAT, start_from_file
from finchtune.weights.base import adapter_keys, load_model, save_adapter


def build_model(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> RWKV6:
    """The base model with its adapters, and exactly the wanted parameters trainable."""
    # Quantised from the file as it is, one layer at a time: the codes do not depend on `dtype`,
    # and the device never holds the whole weights.
    quantised = config.quant != "none"
    # What is trained is written, and every process needs pages of its own for it.
    shared = config.peft != "none" and device.type == "cpu" and distributed.world_size() > 1
    model = load_model(
        config.load_model,
        None if quantised else dtype,
        None if quantised else device,
        config.grad_cp,
        shared,
    )
    check_sizes(config, model)
    if config.peft == "none":
        return model.requires_grad_(True)
    init = not config.peft_load and config.peft != "lora_ga"
    attach(model, config.peft, init=init, **config.adapter_hyperparameters)
    model.to(device=device, dtype=dtype)
    for part in config.train_parts:
        train_part(model, part)
    if config.peft_load:
        start_from_file(model, config)
    return model


def train_part(model: RWKV6, part: str) -> None:
    """Make the parameters with `part` in their names trainable; UserError if that cannot be."""
    chosen = {name: p for name, p in model.named_parameters() if part in name}
    if not chosen:
        raise UserError(f"--train_parts {part}: no parameter has this in its name")
    for name, layer in adapted_layers(model).items():
        if layer.adapter.freezes_W and f"{name}.weight" in chosen:
            raise UserError(
                f"--train_parts {part}: {name} has an adapter of {layer.adapter.name}, beside "
                "which its weight cannot be trained; name other parts, or choose another --peft"
            )
    for parameter in chosen.values():
        parameter.requires_grad_(True)


def describe_parameters(model: RWKV6) -> str:
    """How many parameters a model has, in which dtype, and how many are trained."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return (
        f"{sum(p.numel() for p in parameters) / 1e6:,.2f} M parameters in {parameters[0].dtype}, "
        f"{trained / 1e6:,.2f} M trained"
    )


def start_from_data(model: RWKV6, config: TrainConfig, data: Data, device: torch.device) -> None:
    """Start a method that begins at the gradient of the run's first rows (lora_ga).

    Rank 0 computes it, whatever the number of processes; the others take its tensors as DeepSpeed
    starts. Needs the gradients of all adapted weights in rank 0's memory, in float32. A collective
    call, before DeepSpeed divides the model; does nothing for other methods.
    """
    if config.peft != "lora_ga" or config.peft_load:
        return

    def compute() -> None:
        batches = data.rows(0, 0, 1, config.micro_bsz, config.lora_ga_batches)
        valid = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        rest = iter(batches)

        def loss() -> Tensor:
            return model.loss(*next(rest).to(device)) / max(1, valid)

        start_from_gradients(model, loss, config.lora_ga_batches)

    distributed.from_rank_zero(compute)


def check_sizes(config: TrainConfig, model: RWKV6) -> None:
    """Raise UserError if a size given as a flag contradicts the weight file."""
    sizes = model.config
    in_file = {
        "n_layer": sizes.n_layer,
        "n_embd": sizes.n_embd,
        "vocab_size": sizes.vocab_size,
        "head_size_a": sizes.head_size,
        "dim_att": sizes.n_embd,
        "dim_ffn": sizes.dim_ffn,
    }
    for name, value in in_file.items():
        given = getattr(config, name)
        if given not in (None, value):
            raise UserError(
                f"--{name} {given} contradicts {config.load_model}, where it is {value}; "
                "drop the flag, sizes are read off the file"
            )


def open_data(config: TrainConfig, vocab_size: int) -> Data:
    """The rows that a run trains on, with what it holds out as their `validation`.

    Raises UserError for flags or data that cannot be used.
    """

    # Planning writes nothing.
    cache_dir = None if config.plan else config.data_cache or f"{config.proj_dir}/data_cache"

    def load(data_file: str, val_split: float) -> Data:
        return load_data(
            data_file,
            data_type="sft" if config.sft_field else config.data_type,
            dataload=config.dataload,
            ctx_len=config.ctx_len,
            loss_mask=config.loss_mask,
            sft_field=config.sft_field,
            tokenizer=load_tokenizer(config.tokenizer, vocab_size),
            vocab_size=vocab_size,
            seed=config.random_seed,
            on_bad=config.on_bad,
            val_split=val_split,
            cache_dir=cache_dir,
        )

    data = load(config.data_file, config.val_split)
    if config.val_file:
        data.validation = load(config.val_file, 0.0)
    return data


class Run:
    """Saves what a run makes: adapter or model files by epoch, checkpoints that resume."""

    def __init__(
        self, config: TrainConfig, engine: Engine, data: dict[str, Any], manifest: dict[str, Any]
    ):
        """`manifest` is that of the checkpoint to go on from, empty for a new run.

        A collective call. Raises UserError if the checkpoint is another run's.
        """
        self.config, self.engine, self.data = config, engine, data
        self.folder = Path(config.proj_dir)
        self.base_dtype = next(engine.model.parameters()).dtype
        # Hashing a large base takes a while, and nobody needs it before the first save.
        self._base_sha256: Future[str] | None = None
        if distributed.rank() == 0:
            self._base_sha256 = ThreadPoolExecutor(1).submit(sha256, config.load_model)
        distributed.from_rank_zero(lambda: self._prepare_folder(manifest))

    def _prepare_folder(self, manifest: dict[str, Any]) -> None:
        if manifest:
            self.check_resumable(manifest)
        clean_folder(self.folder, self.config.overwrite)
        write_json(self.folder / "config.json", dataclasses.asdict(self.config))

    def base_sha256(self) -> str:
        """sha256 of the base weights, on rank 0 alone; waits for it if need be."""
        assert self._base_sha256 is not None, "only rank 0 knows the base's hash"
        return self._base_sha256.result()

    def open_metrics(self, total: int, start: int) -> Metrics | None:
        """Where rank 0 reports the steps from `start` to `total`; None on the other ranks."""
        if distributed.rank() != 0:
            return None
        return Metrics(self.folder, total, start, dataclasses.asdict(self.config))

    def record(self) -> dict[str, Any]:
        """What a saved file says of itself; on rank 0, which writes it."""
        return {
            "format": FORMAT,
            "adapter": getattr(self.engine.model, "adapter_spec", {}),
            "base": {
                "file": Path(self.config.load_model).name,
                "sha256": self.base_sha256(),
            },
            "config": dataclasses.asdict(self.config),
            "global_batch": self.global_batch,
            "data": self.data,
        }

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer step, over all processes and micro batches."""
        config = self.config
        return config.micro_bsz * config.accumulate_grad_batches * distributed.world_size()

    def save_epoch(self, epoch: int, step: int) -> Path:
        """Write rwkv-{epoch_begin + epoch}.pth and its JSON. A collective call."""
        name = f"rwkv-{self.config.epoch_begin + epoch}.pth"
        path = self._save_weights(name, {"step": step})
        distributed.say(f"saved {path}")
        return path

    def save_best(self, step: int, val_loss: float) -> Path:
        """Write rwkv-best.pth and its JSON, as save_epoch does. A collective call."""
        return self._save_weights("rwkv-best.pth", {"step": step, "val_loss": val_loss})

    def _save_weights(self, name: str, more: dict[str, Any]) -> Path:
        path = self.folder / name
        layout, tensors = self._file_tensors()

        def write(stream: Iterator[Tensor]) -> None:
            save_adapter(layout, self.record() | more, path, stream)

        distributed.rank_zero_takes(tensors, write)
        return path

    def _file_tensors(self) -> tuple[dict[str, Tensor], Iterator[Tensor]]:
        """What an epoch's file holds: its layout by file key, and the tensors, gathered in turn.

        Trained ones are in fp32, a fully tuned model in its own dtype.
        """
        model, keys = self.engine.model, adapter_keys(self.engine.model)
        dtype = self.base_dtype if self.config.peft == "none" else torch.float32
        trained = self.engine.trained
        layout = {
            key: whole_like(trained[name], dtype)
            if name in trained
            else model.get_buffer(name).to("meta")
            for name, key in keys.items()
        }

        def tensors() -> Iterator[Tensor]:
            for name in keys:
                if name in trained:
                    yield self.engine.whole(trained[name]).to(dtype)
                else:
                    yield model.get_buffer(name)

        return layout, tensors()

    def save_checkpoint(self, step: int, more: dict[str, Any]) -> None:
        """Write checkpoints/step-N, with `more` in its manifest. A collective call."""
        folder, keep_last = self.folder / "checkpoints", self.config.keep_last
        layout, tensors = self.engine.state()

        def write(stream: Iterator[Tensor]) -> None:
            save_checkpoint(folder, step, layout, stream, self.record() | more, keep_last)

        distributed.rank_zero_takes(tensors, write)

    def check_resumable(self, manifest: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless the checkpoint continues this very run."""
        old, new = manifest["config"], dataclasses.asdict(self.config)
        free = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata["free"]}
        changed = [k for k in new if k not in free and old.get(k) != new[k]]
        differing = [f"--{k} {old.get(k)} -> {new[k]}" for k in changed]
        if manifest["global_batch"] != self.global_batch:
            differing.append(
                f"global_batch {manifest['global_batch']} -> {self.global_batch}: choose "
                "--micro_bsz and --accumulate_grad_batches so that their product, times "
                f"{distributed.world_size()} processes, is {manifest['global_batch']} again"
            )
        if manifest["data"] != self.data:
            differing.append(f"data {manifest['data']} -> {self.data}")
        if manifest["base"]["sha256"] != self.base_sha256():
            differing.append(f"--load_model is not the same file as {manifest['base']['file']}")
        if differing:
            raise UserError(f"cannot resume with another configuration: {'; '.join(differing)}")


def restore_tensors(model: RWKV6, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a checkpoint's trained tensors into the model; return its (state, manifest)."""
    state, manifest = load_checkpoint(checkpoint)
    own = model.state_dict()
    if set(state.get("trained", {})) != {n for n, p in model.named_parameters() if p.requires_grad}:
        raise UserError(f"--resume {checkpoint}: it trains other parameters than this run")
    with torch.no_grad():
        for name, tensor in (state["trained"] | state["frozen"]).items():
            own[name].copy_(tensor)
    return state, manifest
