"""The paper's tables: their cells, their commands, and how they are written."""

import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.support import REPOSITORY

from finchtune.cli import evaluate
from finchtune.cli.flags import parse_train_flags
from finchtune.errors import UserError

FOLDER = REPOSITORY / "scripts" / "paper"
DECLARED = ("table2", "table3", "table4", "table5", "table6", "figure5", "figure6")


@pytest.fixture
def paper(monkeypatch):
    """The modules of scripts/paper."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("cells", "command", "glue_data", "language", "smoke_all", "tables", *DECLARED)
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def declared(paper, name):
    module = getattr(paper, name)
    return getattr(module, "TABLE", None) or module.FIGURE


def study_of(paper, name, *words):
    table = declared(paper, name)
    given = paper.command.parser(table).parse_args(["--model", "m.pth", "--output", "out", *words])
    return paper.command.study_of(
        table, given, paper.command.inputs_of(table, given, table.train or {})
    )


DATA = "--data math=a.jsonl code=b.jsonl chat=c.jsonl".split()
TESTS = "--test gsm8k=g math=m humaneval=h mbpp=p mtbench=t".split()


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("smoke", [(), ("--smoke",)])
def test_every_command_of_a_table_is_one_that_is_understood(paper, name, smoke):
    study = study_of(paper, name, *DATA, *(TESTS if declared(paper, name).tested else ()), *smoke)
    folders = set()
    for line, course in study.pairs():
        cell = study.cell(course, line, 1e-3, 0)
        folders.add(cell.folder)
        training, *tests = cell.steps
        config = parse_train_flags(list(training.words[3:]))
        assert config.peft == line.peft
        assert config.proj_dir == str(cell.folder / "train")
        for step in tests:
            assert evaluate.flags().parse_args(step.words[3:]).task in step.words
    assert len(folders) == len(study.lines) * len(study.rates), "a folder for each cell"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--smoke"], "--data math=FILE is missing: what to train on"),
        (["--data", "a.jsonl"], "--data a.jsonl: give it as NAME=..., such as math=FILE"),
        (["--data", "maths=a"], "--data maths=...: known are math, code, chat"),
        (["--test", "loss=a"], "--test loss=...: known are gsm8k, math, humaneval, mbpp, mtbench"),
        ([*DATA, "--shrink", "0"], "--shrink must be at least 1, not 0"),
    ],
)
def test_mistakes_are_told_in_a_line(paper, words, line):
    with pytest.raises(UserError) as error:
        study_of(paper, "table2", *words)
    assert error.value.line == line


def test_flags_after_two_dashes_are_those_of_the_training(paper):
    mine, theirs = paper.command.split(
        ["--smoke", "--", "--ctx_len", "64", "--train_parts", "a", "b"]
    )
    assert mine == ["--smoke"]
    assert paper.command.pairs(theirs) == {"ctx_len": "64", "train_parts": ["a", "b"]}
    with pytest.raises(UserError, match="after -- a flag of finchtune train is expected"):
        paper.command.pairs(["64"])


def test_the_papers_settings_make_the_papers_number_of_steps(paper):
    study = study_of(paper, "table2", *DATA)
    words = study.cell("math", study.lines[-1], 2e-5, 0).steps[0].words
    config = parse_train_flags(list(words[3:]))
    assert 395_000 // config.global_bsz == 6171
    assert (config.bone_r, config.ctx_len, config.lr_schedule) == (64, 512, "constant")
    assert (config.beta1, config.beta2, config.adam_eps) == (0.9, 0.99, 1e-8)


def test_tables_share_their_cells_in_one_folder(paper):
    def folders(name):
        study = study_of(paper, name, *DATA)
        cells = (study.cell(course, line, 1e-3, 0) for line, course in study.pairs())
        return {cell.folder: cell.steps[0].settings for cell in cells if "math" in cell.folder.name}

    of = {name: folders(name) for name in DECLARED}
    shared = of["table2"].keys() & of["figure5"].keys()
    assert len(shared) == 4
    assert len(of["table2"].keys() & of["table3"].keys()) == 1
    assert len(of["table4"].keys() & of["table5"].keys()) == 1
    assert of["table3"].keys() == of["figure6"].keys()
    for one in of.values():
        for other in of.values():
            assert all(one[folder] == other[folder] for folder in one.keys() & other.keys())


def test_a_table_has_means_deviations_and_the_papers_figures(paper):
    Line, Column, Entry = paper.tables.Line, paper.tables.Column, paper.tables.Entry
    lines = (Line("LoRA", "lora", 32, {"gsm8k": 38.13}), Line("Bone", "bone", 64))
    columns = [
        Column("gsm8k", "GSM8K", "math", "gsm8k", "parity", 100),
        Column("judged", "MT-Bench", "math", "mtbench", "judged"),
    ]

    def result(rate):
        return {"training": {"trained": 1000}, "gsm8k": {"parity": rate}, "mtbench": {}}

    entries = {
        ("LoRA", "math"): Entry({1e-3: 2.0, 2e-5: 1.5}, 2e-5, [result(0.5), result(0.6)]),
        ("Bone", "math"): Entry({1e-3: 1.0, 2e-5: 1.5}, 1e-3, [result(0.25)]),
    }
    assert paper.tables.markdown(lines, columns, entries).splitlines() == [
        "| strategy | trained | learning rate | GSM8K | paper | MT-Bench |",
        "| --- | --- | --- | --- | --- | --- |",
        "| LoRA | 1,000 | 2e-05 | 55.00 ± 7.07 | 38.13 | - |",
        "| Bone | 1,000 | 0.001 | 25.00 | - | - |",
    ]
    assert paper.tables.sweep(lines, entries, "math", "loss").splitlines()[4:] == [
        "| LoRA | **1.500** | 2.000 |",
        "| Bone | 1.500 | **1.000** |",
    ]
    rows = paper.tables.as_json(lines, columns, entries)
    assert rows[0]["figures"]["gsm8k"] == {"seeds": [50.0, 60.0], "paper": 38.13}


def test_the_judges_scores_are_taken_where_they_are(paper, tmp_path):
    (tmp_path / "mtbench").mkdir()
    (tmp_path / "result.json").write_text('{"mtbench": {}}')
    cell = paper.cells.Cell(tmp_path, ())
    assert paper.language.read(cell) == {"mtbench": {}}
    scores = "".join(json.dumps({"score": score}) + "\n" for score in (4, 5, -1))
    (tmp_path / "mtbench" / "judgment.jsonl").write_text(scores)
    assert paper.language.read(cell)["mtbench"] == {"judged": 4.5}


def test_matthews_correlation(paper):
    assert paper.glue_data.matthews([1, 1, 0, 0], [1, 1, 0, 0]) == 1
    assert paper.glue_data.matthews([1, 0, 1, 0], [1, 1, 0, 0]) == 0
    assert paper.glue_data.matthews([1, 1, 1, 1], [1, 1, 0, 0]) == 0
    # Three of four right: (2 * 1 - 0 * 1) / sqrt(3 * 2 * 2 * 1).
    assert paper.glue_data.matthews([1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx(2 / 12**0.5)


def step(paper, folder: Path, name: str, program: str, settings=None):
    """A step that runs a line of Python in which `log` appends to a file."""
    code = f"log = lambda text: open({str(folder / 'log')!r}, 'a').write(text)\n{program}"
    return paper.cells.Step(name, ("-c", code), settings or {}, lambda: {"value": 1})


class TestPool:
    def pool(self, paper, jobs=1):
        return paper.cells.Pool([{}] * jobs)

    def test_what_is_finished_is_not_run_again(self, paper, tmp_path):
        one = step(paper, tmp_path, "one", "log('1')")
        two = step(paper, tmp_path, "two", "log('2')")
        self.pool(paper).run([paper.cells.Cell(tmp_path, (one,))])
        both = paper.cells.Cell(tmp_path, (one, two))
        self.pool(paper).run([both])
        self.pool(paper).run([both])
        assert (tmp_path / "log").read_text() == "12"
        assert both.results()["two"] == {"settings": {}, "value": 1}

    def test_a_failure_is_told_after_the_others_are_done(self, paper, tmp_path):
        bad = step(paper, tmp_path, "training", "print('error: no such file'); raise SystemExit(2)")
        after = step(paper, tmp_path, "gsm8k", "log('never')")
        good = step(paper, tmp_path, "training", "log('good')")
        cells = [
            paper.cells.Cell(tmp_path / "bad", (bad, after)),
            paper.cells.Cell(tmp_path / "good", (good,)),
        ]
        with pytest.raises(UserError, match=r"bad: training failed \(error: no such file"):
            self.pool(paper).run(cells)
        assert (tmp_path / "log").read_text() == "good"
        assert not cells[1].missing()

    def test_other_settings_are_refused(self, paper, tmp_path):
        cell = paper.cells.Cell(tmp_path, (step(paper, tmp_path, "one", "", {"r": 8}),))
        self.pool(paper).run([cell])
        other = paper.cells.Cell(tmp_path, (step(paper, tmp_path, "one", "", {"r": 4}),))
        with pytest.raises(UserError, match=r"another r \(8, now 4\); choose another --output"):
            other.missing()

    def test_a_signal_reaches_the_commands_and_ends_the_pool(self, paper, tmp_path):
        wait = (
            "import signal, time, sys\n"
            "signal.signal(signal.SIGTERM, lambda *_: (log('saved'), sys.exit(75)))\n"
            "log('begun '); time.sleep(60)"
        )
        cells = [
            paper.cells.Cell(tmp_path / name, (step(paper, tmp_path, "training", wait),))
            for name in ("a", "b")
        ]

        def stop():
            while not (tmp_path / "log").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        pool = self.pool(paper)
        began = time.monotonic()
        pool.run(cells)
        assert time.monotonic() - began < 50
        assert pool.stopped.is_set()
        assert (tmp_path / "log").read_text() == "begun saved", "the second was not begun"
        assert [len(cell.missing()) for cell in cells] == [1, 1]


def test_the_smoke_runs_of_all_tables_are_commands_that_they_understand(paper):
    given = SimpleNamespace(
        model="m.pth", train="a.jsonl", test=["gsm8k=g.jsonl"], output=Path("out"), jobs=2
    )
    commands = paper.smoke_all.commands(given)
    assert commands.keys() == {*DECLARED, "table1", "figure1"}
    for name in DECLARED:
        table = declared(paper, name)
        found = paper.command.parser(table).parse_args(commands[name])
        assert found.smoke
        assert paper.command.inputs_of(table, found, {}).data.keys() == set(table.courses)


def test_a_table_takes_its_place_in_a_document(paper):
    document = (
        "a\n<!-- table2 -->\nold\n<!-- end table2 -->\nb\n<!-- table3 -->\n<!-- end table3 -->"
    )
    found = paper.smoke_all.put(document, "table2", r"| \d |")
    assert found == document.replace("old", r"| \d |")
    assert paper.smoke_all.put(document, "table4", "new") == document
    marks = (REPOSITORY / "docs/paper.md").read_text()
    for name in paper.smoke_all.commands(
        SimpleNamespace(**dict.fromkeys(("model", "train", "output"), "x"), test=[], jobs=1)
    ):
        if name != "figure1":
            assert marks.count(f"<!-- {name} -->") == marks.count(f"<!-- end {name} -->") == 1
