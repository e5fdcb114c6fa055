"""The configuration of a training run, its flags are in flags.py, what is refused in checks.py."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from finchtune.config.flags import (
    GROUPS,
    LR,
    METHODS,
    STAGES,
    STATE_LR,
    TRAIN_TYPES,
    ContextFlags,
    DataFlags,
    HeldOutFlags,
    MachineFlags,
    MethodFlags,
    ModelFlags,
    RecordFlags,
    StepFlags,
    as_words,
)
from finchtune.methods import flag_methods, method_flags

__all__ = ["GROUPS", "METHODS", "STATE_LR", "TrainConfig", "as_words", "config_yaml"]


@dataclass
class TrainConfig(
    RecordFlags,
    MachineFlags,
    StepFlags,
    HeldOutFlags,
    ContextFlags,
    DataFlags,
    MethodFlags,
    ModelFlags,
):
    """What one training run does. Field names are flag names."""

    def __post_init__(self) -> None:
        assert isinstance(self.train_type, list), self.train_type
        self.train_type = [kind for kind in TRAIN_TYPES if kind in self.train_type]
        if self.lr_init is None:
            self.lr_init = STATE_LR if self.trains_state and self.adapter == "none" else LR

    @property
    def adapter(self) -> str:
        """The adapter's method, none if there is no adapter."""
        return "none" if self.peft == "state" else self.peft

    @property
    def trains_state(self) -> bool:
        """Whether the state that documents begin from is trained."""
        return "state" in (self.peft, *self.train_type)

    @property
    def trains_all(self) -> bool:
        """Whether every parameter is trained."""
        return self.adapter == "none" and not self.trains_state

    @property
    def trained(self) -> str:
        """What is trained, in words."""
        adapter = [] if self.adapter == "none" else [self.adapter]
        states = ["states"] if self.trains_state else []
        return " and ".join(adapter + states) or "all weights"

    @property
    def state_lr(self) -> float:
        """Learning rate of trained states."""
        return self.lr_init if self.adapter == "none" else self.lr_state or STATE_LR

    @property
    def chunked(self) -> bool:
        """Whether contexts are read in chunks."""
        return "infctx" in self.train_type

    def readers(self, world: int) -> int:
        """How many of `world` processes, or groups that share contexts, read rows of their own."""
        return world // self.context_parallel

    @property
    def stage(self) -> int:
        return STAGES[self.strategy]

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several backwards are summed in a step."""
        return self.accumulate_grad_batches > 1 or self.chunked

    @property
    def offload(self) -> bool:
        return self.strategy.endswith("_offload")

    @property
    def adapter_hyperparameters(self) -> dict[str, Any]:
        """Keyword arguments for `attach(model, self.peft, ...)`."""
        own = {
            flag.hyperparameter: getattr(self, name)
            for name, flag in method_flags().items()
            if self.peft in flag.methods
        }
        return own if self.quant == "none" else own | {"quant": self.quant}


def config_yaml(config: TrainConfig) -> str:
    """A configuration as the YAML file that --config takes back."""
    import yaml  # slow to import

    values = {name: value for name, value in vars(config).items() if value is not None}
    for name, methods in flag_methods().items():
        if config.peft not in methods:
            values.pop(name, None)
    if config.global_bsz:
        values.pop("accumulate_grad_batches")  # follows from it
    names = [field.name for field in dataclasses.fields(config)]
    in_order = {name: values[name] for name in names if name in values}
    return yaml.safe_dump(in_order, sort_keys=False)
