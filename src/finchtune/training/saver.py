"""What a run saves: adapter or model files by epoch, checkpoints to resume from."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune import distributed
from finchtune.config import TrainConfig, config_yaml
from finchtune.data import Data
from finchtune.errors import CheckpointError
from finchtune.files import write_json, write_text
from finchtune.models import LanguageModel
from finchtune.report import FACTS
from finchtune.training.checkpoint_content import check_manifest, check_state
from finchtune.training.checkpoints import load_checkpoint, save_checkpoint
from finchtune.training.engine import Engine, full_parameter_like
from finchtune.training.metrics import Metrics
from finchtune.training.run_folder import changed_batch, clean_folder
from finchtune.weights.adapter_files import FORMAT, adapter_keys, save_adapter
from finchtune.weights.hashing import weights_sha256


class Saver:
    """Saves what a run makes: adapter or model files by epoch, checkpoints that resume."""

    def __init__(self, config: TrainConfig, engine: Engine, data: Data, manifest: dict[str, Any]):
        """`manifest` is that of the checkpoint to resume from, empty for a new run.

        A collective call. Raises UserError if the checkpoint is another run's.
        """
        self.config, self.engine, self.data = config, engine, data.describe()
        self.data_changes: list[dict[str, Any]] = manifest.get("data_changes", [])
        self.folder = Path(config.proj_dir)
        self.base_dtype = next(engine.model.parameters()).dtype
        # Hashing a large base or data set takes a while, and nobody needs it before the first save.
        self._base_sha256: Future[str] | None = None
        self._content: Future[str] | None = None
        if distributed.rank() == 0:
            self._base_sha256 = ThreadPoolExecutor(1).submit(weights_sha256, config.load_model)
            self._content = ThreadPoolExecutor(1).submit(data.content)
        distributed.run_on_rank_zero(lambda: self._prepare_folder(manifest))

    def _prepare_folder(self, manifest: dict[str, Any]) -> None:
        if manifest:
            self.check_resumable(manifest)
        clean_folder(self.folder, self.config.overwrite)
        write_text(self.folder / "config.yaml", config_yaml(self.config))
        if not (manifest and (self.folder / FACTS).exists()):
            trained = self.engine.trained.values()
            numbers = sum(full_parameter_like(p, torch.float32).numel() for p in trained)
            begun = time.strftime("%Y-%m-%d %H:%M")
            write_json(self.folder / FACTS, {"begun": begun, "trained": numbers})

    def base_sha256(self) -> str:
        """sha256 of the base weights, on rank 0 alone; waits for it if need be."""
        assert self._base_sha256 is not None, "only rank 0 knows the base's hash"
        return self._base_sha256.result()

    def content(self) -> str:
        """A hash of the data, on rank 0 alone; waits for it if need be."""
        assert self._content is not None, "only rank 0 knows the data's hash"
        return self._content.result()

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
            "dtype": str(self.base_dtype),
            "global_batch": self.global_batch,
            "data": self.data,
            "content": self.content(),
            "data_changes": self.data_changes,
            "template": self.data["template"],
        }

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer step, over all processes and micro batches."""
        config = self.config
        readers = config.readers(distributed.world_size())
        return config.micro_bsz * config.accumulate_grad_batches * readers

    def save_epoch(self, epoch: int, step: int) -> Path:
        """Write rwkv-{epoch_begin + epoch}.pth and its JSON. A collective call."""
        name = f"rwkv-{self.config.epoch_begin + epoch}.pth"
        path = self._save_weights(name, {"step": step})
        distributed.print_rank_zero(f"saved {path}")
        return path

    def save_best(self, step: int, val_loss: float) -> Path:
        """Write rwkv-best.pth and its JSON, as save_epoch does. A collective call."""
        return self._save_weights("rwkv-best.pth", {"step": step, "val_loss": val_loss})

    def _save_weights(self, name: str, more: dict[str, Any]) -> Path:
        path = self.folder / name
        layout, tensors = self._file_tensors()

        def write(stream: Iterator[Tensor]) -> None:
            save_adapter(layout, self.record() | more, path, stream)

        distributed.stream_to_rank_zero(tensors, write)
        return path

    def _file_tensors(self) -> tuple[dict[str, Tensor], Iterator[Tensor]]:
        """What an epoch's file holds: its layout by file key, and the tensors, gathered in turn.

        Trained ones are in fp32, a fully tuned model in its own dtype.
        """
        model, keys = self.engine.model, adapter_keys(self.engine.model)
        dtype = self.base_dtype if self.config.trains_all else torch.float32
        trained = self.engine.trained
        layout = {
            key: full_parameter_like(trained[name], dtype)
            if name in trained
            else model.get_buffer(name).to("meta")
            for name, key in keys.items()
        }

        def tensors() -> Iterator[Tensor]:
            for name in keys:
                if name in trained:
                    yield self.engine.full_parameter(trained[name]).to(dtype)
                else:
                    yield model.get_buffer(name)

        return layout, tensors()

    def save_checkpoint(self, step: int, more: dict[str, Any]) -> None:
        """Write checkpoints/step-N, with `more` in its manifest. A collective call."""
        folder, keep_last = self.folder / "checkpoints", self.config.keep_last
        layout, tensors = self.engine.state()

        def write(stream: Iterator[Tensor]) -> None:
            save_checkpoint(folder, step, layout, stream, self.record() | more, keep_last)

        distributed.stream_to_rank_zero(tensors, write)

    def check_resumable(self, manifest: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless the checkpoint continues this very run.

        Flags are compared before, by `check_flags`.
        """
        readers = self.config.readers(distributed.world_size())
        differing = changed_batch(manifest["global_batch"], self.global_batch, readers)
        cut = manifest["config"].get("micro_bsz")
        if self.config.loss_mean == "micro_batches" and cut != self.config.micro_bsz:
            differing.append(
                f"`micro_bsz` {cut} -> {self.config.micro_bsz}, which changes the loss under "
                "`loss_mean` micro_batches"
            )
        dtype = manifest["dtype"]
        if dtype != str(self.base_dtype):
            differing.append(
                f"weights in {dtype.removeprefix('torch.')} -> "
                f"{str(self.base_dtype).removeprefix('torch.')}: give `precision` as it was"
            )
        if (manifest["data"], manifest["content"]) != (self.data, self.content()):
            differing += self._changed_data(manifest)
        if manifest["base"]["sha256"] != self.base_sha256():
            differing.append(f"`load_model` is not the same file as {manifest['base']['file']}")
        if differing:
            raise CheckpointError(
                f"cannot resume with another configuration: {'; '.join(differing)}"
            )

    def _changed_data(self, manifest: dict[str, Any]) -> list[str]:
        """What to say of data that are not the checkpoint's; nothing where a flag accepts it."""
        if self.config.data_changed:
            change = {"step": manifest["step"], "from": manifest["content"], "to": self.content()}
            self.data_changes = [*self.data_changes, change]
            return []
        counts = manifest["data"]
        told = [f"{k} {counts.get(k)} -> {v}" for k, v in self.data.items() if counts.get(k) != v]
        return [
            f"the data were edited or reordered ({', '.join(told) or 'of the same sizes'}); take "
            "the old ones, or continue with these by `data_changed` 1"
        ]


def restore_tensors(
    model: LanguageModel, checkpoint: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a checkpoint's trained tensors into the model; return its (state, manifest)."""
    state, manifest = load_checkpoint(checkpoint)
    check_manifest(manifest, checkpoint)
    check_state(state, model, checkpoint)
    own, tensors = model.state_dict(), state["trained"] | state["frozen"]
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return state, manifest
