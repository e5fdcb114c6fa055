"""One cell of table 1: a RoBERTa with an adapter on its queries and values, trained on a GLUE task.

The classifier is trained as well. Settings are those of LoRA's code: AdamW with weight decay 0.1,
a warm-up of 6 % and a linear fall of the learning rate, the best epoch's score on the development
set. An interrupted call continues after the last finished epoch.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from glue_data import TASKS, Example, Task, accuracy, matthews, read_examples
from torch import Tensor, nn

from finchtune.adapters import adapter_state, attach, load_adapter_state
from finchtune.errors import UserError, run_cli
from finchtune.files import atomic_path, remove, write_json
from finchtune.training.optim import learning_rate

TARGETS = r".*\.attention\.self\.(query|value)"
WEIGHT_DECAY, WARMUP, MAX_NORM = 0.1, 0.06, 1.0
EVALUATION_BATCH = 64


def main() -> None:
    given = parse()
    task = TASKS[given.task]
    torch.manual_seed(given.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(given.model, task)
    total = sum(p.numel() for p in model.parameters())
    trained = adapt(model, given)
    model.to(device)
    train, dev = (read_examples(given.data, task, split) for split in ("train", task.dev))
    train = train[: given.limit]
    steps = math.ceil(len(train) / task.batch) * (given.epochs or task.epochs)
    run = Run(model, tokenizer, task, given, steps)
    state = given.output / "epoch.pth"
    if state.exists():
        run.resume(state)
    while run.step < steps:
        run.epoch(train, dev)
        run.save(state)
        print(f"step {run.step}/{steps}: {run.scores[-1]:.4f}", flush=True)
    outcome = {
        "trained": trained,
        "share": trained / total,
        "steps": steps,
        "score": max(run.scores),
        "last_score": run.scores[-1],
        "choice": -max(run.scores),
    }
    write_json(given.output / "outcome.json", outcome)
    remove(state)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of a RoBERTa with its tokenizer")
    add("--data", required=True, type=Path, help="folder of the task's train* and validation*")
    add("--task", required=True, choices=TASKS)
    add("--peft", required=True)
    add("--r", required=True, type=int)
    add("--alpha", type=float, help="of LoRA and its kin that have one")
    add("--lr", type=float, required=True)
    add("--epochs", type=int, help="default: the task's own")
    add("--seed", type=int, default=0)
    add("--limit", type=int, help="only the first so many examples")
    add("--output", required=True, type=Path)
    return parser.parse_args()


def load(folder: str, task: Task) -> tuple[nn.Module, Any]:
    """A classifier on the RoBERTa in a folder, and its tokenizer. UserError if it cannot be had."""
    try:
        from transformers import AutoTokenizer, RobertaForSequenceClassification, logging
    except ImportError as error:
        raise UserError("table 1 needs transformers: pip install transformers") from error
    logging.set_verbosity_error()  # that the classifier is new
    local = {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model = RobertaForSequenceClassification.from_pretrained(
            folder, num_labels=task.n_labels, dtype=torch.float32, **local
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: no RoBERTa with its tokenizer: {error}") from error
    return model, tokenizer


def adapt(model: nn.Module, given: argparse.Namespace) -> int:
    """Put the adapter on, and make the classifier trainable; returns the adapter's parameters."""
    alpha = {} if given.alpha is None else {"alpha": given.alpha}
    attach(model, given.peft, targets=TARGETS, r=given.r, **alpha)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.classifier.requires_grad_(True)
    return trained


class Run:
    """A training of `steps` steps, epoch by epoch."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, task: Task, given: argparse.Namespace, steps: int
    ):
        self.model, self.tokenizer, self.task, self.steps = model, tokenizer, task, steps
        self.seed, self.lr = given.seed, given.lr
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=given.lr, weight_decay=WEIGHT_DECAY)
        self.step, self.scores = 0, list[float]()

    def epoch(self, train: Sequence[Example], dev: Sequence[Example]) -> None:
        """One pass over the examples in an order of its own, and the score after it."""
        torch.manual_seed(hash((self.seed, self.step)))  # the order and dropout
        order = torch.randperm(len(train)).tolist()
        self.model.train()
        for inputs, labels in self._batches([train[i] for i in order], self.task.batch):
            loss = self.model(**inputs, labels=labels).loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            warmup = int(WARMUP * self.steps)
            rate = learning_rate(self.step, self.steps, self.lr, 0.0, "linear", warmup)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.step += 1
        self.scores.append(self.score(dev))

    @torch.no_grad()
    def score(self, dev: Sequence[Example]) -> float:
        """The task's score on examples."""
        self.model.eval()
        found: list[int] = []
        for inputs, _ in self._batches(dev, EVALUATION_BATCH):
            found += self.model(**inputs).logits.argmax(-1).tolist()
        metric = matthews if "Matthews" in self.task.title else accuracy
        return metric(found, [label for _, label in dev])

    def _batches(
        self, examples: Sequence[Example], size: int
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        device = self.parameters[0].device
        for start in range(0, len(examples), size):
            some = examples[start : start + size]
            texts = map(list, zip(*(sentences for sentences, _ in some), strict=True))
            longest = min(512, self.model.config.max_position_embeddings - 2)
            inputs = self.tokenizer(
                *texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            named = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
            yield named, torch.tensor([label for _, label in some], device=device)

    def save(self, path: Path) -> None:
        """Write all that the next epoch depends on."""
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "step": self.step,
                    "scores": self.scores,
                    "adapter": adapter_state(self.model),
                    "classifier": self.model.classifier.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                temporary,
            )

    def resume(self, path: Path) -> None:
        """Continue from a file of `save`."""
        found = torch.load(path, weights_only=True)
        self.step, self.scores = found["step"], found["scores"]
        load_adapter_state(self.model, found["adapter"])
        self.model.classifier.load_state_dict(found["classifier"])
        self.optimizer.load_state_dict(found["optimizer"])


if __name__ == "__main__":
    run_cli(main)
