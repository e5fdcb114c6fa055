"""Many questions at once get the answers that each gets alone."""

from helpers.support import small_model

from finchtune.evaluation.asking import Asker, Wish, common_length
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.mtbench import MTBench
from finchtune.inference.generate import generate_batch
from finchtune.tokenizer import BytesTokenizer

PROMPTS = [f"A long beginning that all of them share. Question {i}: {'x' * i}" for i in range(9)]


def test_common_beginning():
    assert common_length([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 2
    assert common_length([[1, 2], [1, 2]]) == 1
    assert common_length([[1, 2], [1, 2, 3]]) == 1
    assert common_length([[1], [2]]) == common_length([[1, 2, 3]]) == common_length([[], [1]]) == 0


def test_answers_are_those_of_each_prompt_alone():
    """Although what the prompts share is read once, and fewer rows fit than are wanted."""
    model, tokenizer = small_model(), BytesTokenizer()
    ended = []
    asker = Asker(model, tokenizer, max_rows=4, advance=ended.append)
    found = asker.write([Wish(prompt, 12, ("~",)) for prompt in PROMPTS])
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = generate_batch(
            model, [tokenizer.encode(prompt)], 12, stop_strings=("~",), tokenizer=tokenizer
        )[0]
        assert text == tokenizer.decode(ids)
    assert sum(ended) == len(PROMPTS)


def test_seeds_make_answers_independent_of_their_neighbours():
    asker = Asker(small_model(), BytesTokenizer())
    wishes = [Wish("a", 20, (), temperature=1.0, seed=seed) for seed in range(4)]
    together = asker.write(wishes)
    assert len(set(together)) == 4
    assert asker.write(wishes[2:3]) == together[2:3]


def test_dialogues_go_on_from_their_answers():
    task = MTBench(Choices(max_tokens=6))
    record = {"question_id": 81, "category": "math", "turns": ["One?", "Two?"]}
    task.check(record)
    assert task.prompt(record, [" It is. \n"]) == (
        "User: One?\n\nAssistant: It is.\n\nUser: Two?\n\nAssistant:"
    )
    assert task.temperature(record) == 0.0
    assert task.temperature(record | {"category": "writing"}) == 0.7
