"""The report: its figures, its escaping, damaged runs, and how a real browser shows it."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers.support import assert_one_error_line, run_script

from finchtune.report import plot_loss, write_report
from finchtune.report.chart import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Line, chart, number
from finchtune.report.picture import title_of
from finchtune.report.series import (
    MAX_POINTS,
    method_of,
    read_run,
    running_mean,
    smoothed,
    thinned,
)

EVIL = "</script><script>document.title='taken'</script><b onclick=x>"


def make_run(folder, steps=60, config=None, tail="", **more):
    folder.mkdir()
    (folder / "run.json").write_text('{"begun": "2026-11-28 02:30", "trained": 1234567}')
    rows = [
        {"step": s, "loss": 3 - s / steps, "lr": 1e-4, "grad_norm": 1.0 + s % 7, "tokens": 100,
         "tokens_per_s": 50.0, "memory_mb": 700 + s, "seconds": 2.0, **more}
        | ({"val_loss": 2.5 - s / steps} if s % 20 == 0 else {})
        for s in range(1, steps + 1)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    (folder / "config.yaml").write_text(json.dumps(config or {"peft": "bone", "lr_init": 1e-4}))
    return folder


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def test_one_run_shows_its_figures_and_needs_no_other_file(tmp_path):
    folder = make_run(tmp_path / "one")
    text = write_report([folder], tmp_path / "report.html").read_text()
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert cards["Steps"] == "60"
    assert cards["Loss"] == "2.0167"  # the mean of the last three
    assert cards["Best validation loss"] == "1.5000 at step 60"
    assert cards["Tokens"] == "6,000"
    assert cards["Peak memory"] == "760 MiB"
    assert cards["Training time"] == "2:00 min"
    assert cards["Method"] == "bone"
    assert cards["Trained parameters"] == "1,234,567"
    assert cards["Begun"] == "2026-11-28 02:30"
    assert "Skipped steps" not in cards, "a tile without a figure"
    tags = Tags(text)
    assert tags.found.count("svg") == 6
    loads = [a for a in tags.attributes if a[1] in ("src", "href", "srcset")]
    assert not loads
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert "url(" not in text


def test_what_was_not_recorded_has_neither_tile_nor_chart(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [{"step": s, "loss": 1.0} for s in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert text.count("<figure") == 1
    assert "<dd></dd>" not in text
    assert "<dd>-</dd>" not in text


def test_the_mean_has_no_kink_where_large_values_leave_it():
    """A mean of the last twentieth drops by a twentieth of the first loss at that step."""
    points = [(float(i), 100.0 if i == 0 else 1.0) for i in range(400)]
    means = [y for _, y in smoothed(points)]
    drops = [a - b for a, b in pairwise(means)]
    assert all(after <= before + 1e-12 for before, after in pairwise(drops))
    assert means[-1] == pytest.approx(1.0, abs=1e-6)
    assert smoothed([(1.0, 5.0)]) == [(1.0, 5.0)]


def test_the_picture_says_what_it_shows(tmp_path):
    config = {"peft": "bone", "bone_r": 64, "load_model": "/a/$base$.pth"}
    run = read_run(make_run(tmp_path / "run", config=config))
    assert title_of(run) == r"bone r 64, \$base\$.pth, final loss 2.0167"
    plot_loss(tmp_path / "run", tmp_path / "loss.png")
    for trained, told in (
        ({"train_type": ["state", "infctx"]}, "bone r 64, states"),
        ({"peft": "none", "train_type": ["state"]}, "states"),
        ({"peft": "state", "train_type": []}, "states"),
        ({"peft": "none", "train_type": ["infctx"]}, "all weights"),
    ):
        assert method_of(config | trained) == told


@pytest.mark.parametrize(
    ("kind", "told"), [("none", "bone r 8"), ("state", "bone r 8, states"), ("infctx", "bone r 8")]
)
def test_runs_from_before_train_type_took_several_words_are_named_and_differ_in_nothing(
    tmp_path, kind, told
):
    words = [] if kind == "none" else [kind]
    config = {"peft": "bone", "bone_r": 8}
    runs = [
        make_run(tmp_path / name, config=config | {"train_type": value})
        for name, value in (("old", kind), ("new", words))
    ]
    assert [method_of(read_run(run).config) for run in runs] == [told, told]
    text = write_report(runs, tmp_path / "report.html").read_text()
    assert "<tr><th>train_type</th>" not in text


def test_several_runs_list_only_what_differs(tmp_path):
    common = {"peft": "bone", "ctx_len": 512}
    runs = [make_run(tmp_path / f"run{i}", config=common | {"lr_init": lr, "bone_load": None})
            for i, lr in enumerate((1e-4, 2e-4))]  # fmt: skip
    text = write_report(runs, tmp_path / "report.html").read_text()
    table = text[text.index("Differences in configuration") :]
    assert re.findall(r"<tr><th>(\w+)</th>", table) == ["lr_init"]
    assert "<td>0.0001</td><td>0.0002</td>" in table


def test_everything_from_a_run_is_escaped(tmp_path):
    folder = make_run(tmp_path / "a<i>b", config={"sample_prompt": EVIL, "data_file": EVIL})
    row = {"step": 3, "prompt": EVIL, "text": EVIL}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    other = make_run(tmp_path / "other")
    text = write_report([folder, other], tmp_path / "report.html").read_text()
    tags = Tags(text)
    assert "i" in tags.found  # the marks
    assert {tag for tag, name, _ in tags.attributes if name == "onclick"} == set()
    assert tags.found.count("script") == 6 + 1  # the data of each chart, and our own
    assert "a<i>b" not in text


def test_damaged_and_unfinished_runs_are_shown_as_far_as_they_can_be_read(tmp_path):
    damaged = make_run(tmp_path / "damaged", tail='{"step": 61, "lo')
    with (damaged / "metrics.jsonl").open("ab") as file:
        file.write(b"\n\xff\xfe\n[1, 2]\n" + b'{"step": "x"}\n{"step": 61, "loss": NaN}\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("{")
    log = read_run(damaged)
    assert log.points("loss")[-1] == (60, 2.0)
    assert "metrics.jsonl: 3 of 65 lines are damaged" in log.problems[0]
    text = write_report([damaged, empty], tmp_path / "report.html").read_text()
    assert "3 of 65 lines" in text
    assert "metrics.jsonl cannot be read" in text
    assert "config.yaml: cannot be read as YAML" in text
    write_report([empty], tmp_path / "report.html")
    assert "nothing recorded" in (tmp_path / "report.html").read_text()


def test_skipped_steps_are_counted(tmp_path):
    folder = make_run(tmp_path / "run", steps=5)
    rows = [{"step": step, "loss": "nan", "documents": [1, 2]} for step in (6, 7)]
    (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert "<dt>Skipped steps</dt><dd>2</dd>" in text


def test_a_curve_goes_where_its_values_are():
    svg = chart("t", "u", [Line("a", [(0, 1.0), (5, 3.0), (10, 2.0)])])
    points = re.search(r'class="curve s0"[^>]* points="(.*?)"', svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points.split())
    assert (x0, x1, x2) == (LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT)
    assert TOP < y1 < y2 < y0 < HEIGHT
    assert y2 - y1 == pytest.approx(y0 - y2, abs=0.11)


def test_ticks_are_round_and_inside():
    assert Axis([0.0, 10.0], 0, 1).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Axis([1e-5, 2.3e-5], 0, 1).ticks(4) == pytest.approx([1e-5, 1.5e-5, 2e-5])
    assert Axis([0.05, 200.0], 0, 1, log=True).ticks(5) == pytest.approx([0.1, 1, 10, 100])
    same = Axis([3.0, 3.0], 0, 1)
    assert same(3.0) == 0.5
    assert [number(v) for v in (0, 12345.6, 0.0421, 2e-5, 1.5)] == [
        "0", "12,346", "0.0421", "2e-5", "1.5",
    ]  # fmt: skip


def test_thinning_keeps_peaks_and_order():
    points = [(i, 100.0 if i == 7777 else float(i % 3)) for i in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS
    assert (7777, 100.0) in kept
    assert kept == sorted(kept)
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_loss_picture(tmp_path):
    folder = make_run(tmp_path / "run")
    picture = plot_loss(folder, tmp_path / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def browse(page, folder):
    """The page's elements after its scripts ran, by Debian's chromium."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs a browser: apt-get install chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --dump-dom"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *flags.split(), profile, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_a_browser_shows_the_values_under_the_pointer_and_runs_nothing_foreign(tmp_path):
    folder = make_run(tmp_path / "run", config={"sample_prompt": EVIL})
    other = make_run(tmp_path / f"evil {EVIL.replace('/', '')}", config={"sample_prompt": "x"})
    page = write_report([folder, other], tmp_path / "report.html")
    move = """<script>
        const svg = document.querySelectorAll("svg")[1], box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, clientY: box.top}));
        </script></body>"""
    page.write_text(page.read_text().replace("</body>", move))
    seen = browse(page, tmp_path)
    tip = re.search(r'<div class="tip"(?: style="[^"]*")?>(.*?)</div></div>', seen)[1]
    assert "step 60" in tip
    assert "run: 1.5" in tip
    assert "<title>2 runs</title>" in seen


MEASURE = """<script>
    const cut = [...document.querySelectorAll("svg text")].filter((text) => text.getBBox().x < 0);
    const grid = document.querySelector(".charts").getBoundingClientRect();
    const figures = [...document.querySelectorAll("figure")].map((f) => f.getBoundingClientRect());
    const filled = figures.reduce((sum, box) => sum + (box.width + 16) * (box.height + 16), 0);
    parent.document.title = JSON.stringify({cut: cut.map((t) => t.textContent),
        width: innerWidth, wide: document.documentElement.scrollWidth - innerWidth,
        filled: filled / ((grid.width + 16) * (grid.height + 16))});
    </script></body>"""


@pytest.mark.parametrize("width", [420, 1300])
def test_a_browser_cuts_no_label_and_leaves_no_hole(width, tmp_path):
    """Also where the charts are odd in number, and values long."""
    folder = make_run(tmp_path / "run", lr=1.2345e-5, grad_norm=1.25e7)
    page = write_report([folder], tmp_path / "report.html")
    inner = escape(page.read_text().replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"  # the browser's own window is never narrower than 500
    frame.write_text(
        f'<title></title><iframe style="border:0" width="{width}" height="900" srcdoc="{inner}">'
    )
    seen = browse(frame, tmp_path)
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", seen)[1]))
    assert found["width"] == width
    assert found["cut"] == []
    assert found["wide"] <= 0
    assert found["filled"] > 0.97


def test_the_script_writes_a_page_and_refuses_a_missing_folder(tmp_path):
    folder = make_run(tmp_path / "run")
    done = run_script("scripts/report.py", folder, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "<h1>run</h1>" in (tmp_path / "page.html").read_text()
    done = run_script("scripts/report.py", tmp_path / "none")
    assert_one_error_line(done, "none: no such folder")
