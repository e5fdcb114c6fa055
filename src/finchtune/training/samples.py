"""Text that the model writes while it is trained."""

import json
from pathlib import Path

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.inference.generate import generate
from finchtune.models import LanguageModel
from finchtune.tokenizer import load_tokenizer
from finchtune.training.metrics import rewind
from finchtune.training.schedule import Schedule


class Samples:
    """Continues --sample_prompt now and then, greedily, and keeps it in samples.jsonl."""

    def __init__(
        self,
        config: TrainConfig,
        model: LanguageModel,
        folder: Path,
        schedule: Schedule,
        start: int,
    ):
        self.config, self.model, self.schedule = config, model, schedule
        self.path = folder / "samples.jsonl"
        if not config.sample_prompt:
            return
        self.tokenizer = load_tokenizer(config.tokenizer, model.config.vocab_size)
        if distributed.rank() == 0 and self.path.exists():
            rewind(self.path, start)

    def write(self, step: int) -> None:
        """Sample after `step` steps, where it is time to. A collective call.

        All ranks write the same text, since under ZeRO-3 each holds a part of the weights.
        """
        if not self.config.sample_prompt or not self.schedule.samples(step):
            return
        prompt = self.tokenizer.encode(self.config.sample_prompt)
        self.model.eval()
        tokens = list(generate(self.model, prompt, self.config.sample_tokens, temperature=0))
        self.model.train()
        if distributed.rank() == 0:
            text = self.tokenizer.decode(tokens)
            row = {"step": step, "prompt": self.config.sample_prompt, "text": text}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"sample after step {step}: {text!r}", flush=True)
