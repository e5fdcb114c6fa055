"""lm-evaluation-harness runs its tasks on a finchtune model, and its numbers are ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.support import save_model, small_model

from finchtune.errors import UserError
from finchtune.inference.generate import generate_batch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from finchtune.evaluation.harness import FinchtuneLM, wish_of  # noqa: E402

PAIRS = [("1 + 1 =", " 2"), ("A longer context, it is.", " And more"), ("", "Begins"), ("a", "b")]


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> FinchtuneLM:
    path = save_model(small_model(), tmp_path_factory.mktemp("model") / "m.pth")
    return FinchtuneLM(str(path))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


@torch.no_grad()
def test_loglikelihoods_are_ours(lm):
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (total, likeliest) in zip(PAIRS, found, strict=True):
        ids = [*(context.encode() or b"\0"), *continuation.encode()]
        labels = torch.tensor([[-100] * (len(ids) - len(continuation)) + ids[-len(continuation) :]])
        loss, _ = lm.asker.model.loss(torch.tensor([ids[:-1]]), labels[:, 1:])
        assert total == pytest.approx(-loss.item(), rel=1e-5)
        greedy = generate_batch(
            lm.asker.model, [list(ids[: -len(continuation)])], len(continuation)
        )
        assert likeliest == (bytes(greedy[0]) == continuation.encode())


@torch.no_grad()
def test_rolling_is_the_whole_document(lm):
    texts = [("One.",), ("Another, longer text. " * 20,)]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    for (text,), total in zip(texts, found, strict=True):
        ids = torch.tensor([[0, *text.encode()]])
        loss, _ = lm.asker.model.loss(ids[:, :-1], ids[:, 1:])
        assert total == pytest.approx(-loss.item(), rel=1e-5)


def test_settings_of_generation():
    wish = wish_of(
        "a", {"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0.8}, 0
    )
    assert (wish.stops, wish.max_tokens, wish.temperature) == (["\n"], 7, 0.0)
    assert wish_of("a", {"temperature": 0.8}, 0).temperature == 0.8
    assert wish_of("a", {"do_sample": True}, 0).temperature == 1.0
    with pytest.raises(UserError, match="'num_beams' is none of"):
        wish_of("a", {"num_beams": 4}, 0)


def test_its_gsm8k_runs_on_local_files(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}.\n#### {2 * i}"}
        for i in range(12)
    ]
    files = {}
    for split, part in (("train", rows[:6]), ("test", rows[6:])):
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in part))
    original = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    settings = {
        "include": str(original),
        "task": "local_gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 24},
    }
    (tmp_path / "local_gsm8k.yaml").write_text(json.dumps(settings))
    results = lm_eval.simple_evaluate(
        lm,
        tasks=["local_gsm8k"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["local_gsm8k"]["exact_match,strict-match"] == 0.0
    samples = results["samples"]["local_gsm8k"]
    assert len(samples) == 2 * 6  # by its two ways to find the answer
    for sample in samples:
        context = sample["arguments"][0][0]
        assert context.count("Question:") == 6  # five examples
        ids = generate_batch(
            lm.asker.model,
            [list(context.encode())],
            24,
            stop_strings=["Question:", "\n\n"],
            tokenizer=lm.asker.tokenizer,
        )
        assert sample["resps"] == [[lm.asker.tokenizer.decode(ids[0])]]


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("lm_eval", "import finchtune.evaluation.harness"),
        ("math_verify", "from finchtune.evaluation.tasks.math import same_value as f; f('1', '1')"),
    ],
)
def test_missing_package_is_told_in_one_line(package, code):
    blocked = f"import sys; sys.modules[{package!r}] = None; {code}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert "UserError" in done.stderr.splitlines()[-1]
    assert "pip install 'finchtune[eval]'" in done.stderr.splitlines()[-1]
