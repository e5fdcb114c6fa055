"""GLUE's tasks: their sentences, labels and settings, their files, and a made-up stand-in."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finchtune.errors import UserError
from finchtune.evaluation.runner import read_records

Example = tuple[tuple[str, ...], int]
"""The sentences, and the label."""


@dataclass(frozen=True)
class Task:
    """A task as LoRA's code for GLUE trains it on RoBERTa-base (Hu et al. 2021, table 9)."""

    title: str
    sentences: tuple[str, ...]
    n_labels: int
    lr: float
    epochs: int
    batch: int
    dev: str = "validation"


TASKS = {
    "mnli": Task("MNLI", ("premise", "hypothesis"), 3, 5e-4, 30, 16, "validation_matched"),
    "sst2": Task("SST-2", ("sentence",), 2, 5e-4, 60, 16),
    "cola": Task("CoLA, Matthews", ("sentence",), 2, 4e-4, 80, 32),
    "qnli": Task("QNLI", ("question", "sentence"), 2, 4e-4, 25, 32),
    "mrpc": Task("MRPC", ("sentence1", "sentence2"), 2, 4e-4, 30, 16),
}


def read_examples(folder: Path, task: Task, split: str) -> list[Example]:
    """A split's examples from FOLDER/SPLIT*, such as .parquet or .jsonl with GLUE's columns."""
    found = []
    for where, record in read_records(str(folder / f"{split}*")):
        try:
            label = record["label"]
            sentences = tuple(record[name] for name in task.sentences)
        except (KeyError, TypeError):
            wanted = ", ".join([*task.sentences, "label"])
            raise UserError(f"{where}: not an example with the fields {wanted}") from None
        if label not in range(task.n_labels) or not all(isinstance(s, str) for s in sentences):
            raise UserError(f"{where}: sentences and a label below {task.n_labels} are needed")
        found.append((sentences, label))
    return found


def accuracy(found: Sequence[int], expected: Sequence[int]) -> float:
    """The share that is right."""
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def matthews(found: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation of two labels; 0 where one of the two never occurs."""
    pairs = list(zip(found, expected, strict=True))
    tp, tn = pairs.count((1, 1)), pairs.count((0, 0))
    fp, fn = pairs.count((1, 0)), pairs.count((0, 1))
    whole = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(whole) if whole else 0.0


NOUNS = "cat dog fox owl crow hare wolf bear toad mole".split()
VERBS = "sees hears likes chases meets feeds".split()
SIGNS = ("gladly", "sadly", "maybe")
"""A label's word; the rest of a made-up sentence says nothing about it."""
WRONG = 0.25  # of these words, drawn without regard to the label


def make_inputs(folder: Path, rows: int = 320) -> tuple[Path, Path]:
    """A tiny random RoBERTa with a tokenizer of whole words, and made-up sentences for each task.

    Returns the folders of the model and of the data. What is there already stays.
    """
    model, data = folder / "model", folder / "data"
    if not (model / "config.json").exists():
        make_model(model)
    for number, (name, task) in enumerate(TASKS.items()):
        rng = random.Random(number)
        for split, n in (("train", rows), (task.dev, rows // 4)):
            lines = [json.dumps(make_record(task, rng)) for _ in range(n)]
            (data / name).mkdir(parents=True, exist_ok=True)
            (data / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return model, data


def make_record(task: Task, rng: random.Random) -> dict[str, str | int]:
    """Sentences, in the last of which one word tells the label, but for a few that are wrong."""
    label, told = (rng.randrange(task.n_labels) for _ in range(2))
    texts = [f"{rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(NOUNS)}" for _ in task.sentences]
    texts[-1] += f" {SIGNS[told if rng.random() < WRONG else label]}"
    return dict(zip(task.sentences, texts, strict=True)) | {"label": label}


def make_model(folder: Path) -> None:
    """Two layers of width 64, never trained."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    ids = {word: i for i, word in enumerate([*special, *NOUNS, *VERBS, *SIGNS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    RobertaModel(config).save_pretrained(folder)
