"""The report of a comparison as a page: what it shows, that it loads nothing, and how it looks in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from hf_esm import Comparison, Interference
from hf_esm.evaluation.interference import SHARES, LayerInterference
from hf_esm.evaluation.page import Axis
from hf_esm.evaluation.report import write_report
from hf_esm.evaluation.search import Found
from hf_esm.evaluation.summary import Row
from hf_esm.methods.averaging import Mean
from hf_esm.metrics import colour_of


HOSTILE = '"><script>alert(1)</script><img src="https://example.org/x.png">'
TASKS = ["sst2", "a task with a name that is long enough to be broken_into_lines", HOSTILE]
METHODS = ["mean", "task-arithmetic", "ties", "tsv-m", "iso-c", "esm", "esm++"]
VOID = {"meta", "img", "path", "polyline"}


class Page(HTMLParser):
    """The elements of a page, the text in them, and the names of those that are open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.open, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def row(label, method, value, tasks, **options):
    scores = {task: max(min(value + 0.02 * i, 1.0), 0.0) for i, task in enumerate(tasks)}
    known = {
        "alphas": {0: 0.4},
        "task_intervals": {task: (score - 0.05, min(score + 0.04, 1.0)) for task, score in scores.items()},
        "average": sum(scores.values()) / len(scores),
        "normalised": value + 0.05,
        "interval": (value, value + 0.09),
        "difference": value - 0.7,
        "difference_interval": (value - 0.8, value - 0.6),
        "by_seed": {0: value},
        "routing": {},
        "confusion": [],
        "alpha_scores": {0: {0.2: value - 0.2, 0.4: value, 0.6: value - 0.1, 1.0: value - 0.4}},
        "alpha_default": 1.0,
        "choosing": {0: (9, 2.5)},
        "seconds": 3.25,
        "memory": 10**9,
        "size": 2 * 10**9,
    }
    return Row(label=label, method={"name": method}, tasks=scores, **known | options)


def comparison(tasks=TASKS, methods=METHODS, **options):
    count = len(tasks)
    table = [[1.0 if i == j else 0.07 * (i + j) for j in range(count)] for i in range(count)]
    energy = {task: [1 - 0.7 ** (i + 1) for i in range(len(SHARES))] for task in tasks}
    layers = [
        LayerInterference(f"bert.layer.{i}.{kind}.weight", 0.3 + 0.1 * i, table, [1, 2, 4, 8, 16], energy, energy)
        for i in range(3)
        for kind in ("query", "value")
    ]
    rows = [row(name, name, 0.5 + 0.05 * i, tasks) for i, name in enumerate(methods)]
    rows.append(row(f"esm {HOSTILE}", "esm", 0.6, tasks))
    rows.append(row("esm++, tasks given", "esm++", 0.9, tasks, routing=dict.fromkeys(tasks, 0.9), confusion=table))
    rows.append(row("nothing", "mean", float("nan"), tasks, task_intervals=dict.fromkeys(tasks, (float("nan"),) * 2)))
    found = Found("esm", Mean(), {"shrinkage": 0.1}, 0.9, 0.8, {"shrinkage": 0.7, HOSTILE: 0.3}, 20, "rows")
    known = {
        "rows": rows,
        "experts": dict.fromkeys(tasks, 0.93),
        "metric": "accuracy",
        "how": ["α was chosen on 64 validation rows per task."],
        "interference": Interference(list(tasks), layers),
        "base": dict.fromkeys(tasks, 0.31),
        "num_rows": dict.fromkeys(tasks, 400),
        "searches": [found],
    }
    return Comparison(**known | options)


@pytest.fixture
def report(tmp_path):
    measured = comparison()
    write_report(measured, tmp_path, pictures="none")
    return measured, (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_every_row_and_loads_nothing(report):
    measured, text = report
    page = Page(text)
    for row in measured.rows:
        (cells,) = [cells for cells in page.rows if cells[0] == row.label and len(cells) > 9]
        assert f"{100 * row.normalised:.1f} ({100 * row.interval[0]:.1f} to" in cells[6] or row.label == "nothing"
        assert "nan" not in "".join(cells)
    for reference in ("test rows", "the experts", "the base"):
        assert any(cells[0] == reference for cells in page.rows)
    assert {tag for tag, _ in page.elements} & {"img", "link", "iframe", "object", "embed", "base", "form"} == set()
    assert [tag for tag, _ in page.elements].count("script") == 1
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "action", "onclick", "onerror", "srcset"}
        assert "url(" not in (attributes.get("style") or "")
    assert "@import" not in text and "url(" not in text
    assert "https://" not in text.replace(HOSTILE.replace('"', "&#34;").replace("<", "&lt;").replace(">", "&gt;"), "")


def test_how_alpha_was_chosen_and_what_that_cost_is_said(report, tmp_path):
    measured, text = report
    head, *cells = Page(text.split("<h2>How α was chosen</h2>")[1].split("<h2>")[0]).rows
    assert head == ["method", "default α", "chosen α", "best α", "α tried", "models scored", "time"]
    assert ["esm", "1", "0.4", "0.4", "4", "9", "2.5 s"] in cells
    assert len(cells) == len({str(row.alpha_scores) for row in measured.rows})  # of a routed model once
    assert "| esm | 1 | 0.4 | 0.4 | 4 | 9 | 2.5 s |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    curves = text.split("<h3>Validation score by α</h3>")[1].split("</figure>")[0]
    assert re.findall(r'class="mark chosen" title="esm: (.*?),', curves) == ["0.4"]
    assert re.findall(r'class="mark default" title="esm: (.*?),', curves) == ["1"]


def test_names_of_strangers_are_text_alone(report):
    _, text = report
    assert "<script>alert" not in text and "<img" not in text
    assert HOSTILE in "".join(Page(text).text)


def test_bars_have_one_colour_a_method_and_lines_for_experts_and_base(report):
    measured, text = report
    page = Page(text)
    colours = {a["style"].split(";")[0] for tag, a in page.elements if a.get("class", "").split(" ")[0] == "bar"}
    expected = {colour_of(row.method["name"]) for row in measured.rows}
    assert colours == {f"--c: {colour}" for colour in expected | {"#56B4E9"}}
    kept, first = text.split("<figure>")[1:3]
    for panel, ends in ((kept, (1.0, 1 / 3)), (first, (0.93, 0.31))):
        legend = re.findall(r"</i>([^<]*)</li>", panel)
        assert legend == [
            f"{name}: {100 * end:.3g} %" for name, end in zip([legend[0].split(":")[0], "the base"], ends)
        ]
        assert 'class="unit"' in panel and panel.count('class="whisker"') == len(measured.rows) - 1


def test_heat_maps_have_values_and_curves_have_units(report):
    _, text = report
    between = Page(text.split("<h2>Between the tasks</h2>")[1].split("<h2>")[0]).rows
    assert ["sst2", "100", "7", "14"] in between
    assert "Vertical: accuracy on validation rows." in text and "α, the scale of the merged update" in text
    assert "α = 0.4" in text and "block of the model" in text


@pytest.mark.parametrize("methods", [["mean"], METHODS])
def test_errors_have_an_axis_of_their_own_and_little_is_enough(tmp_path, methods):
    bare = comparison(["a"], methods, base={}, num_rows={}, searches=[], metric="perplexity", higher_is_better=False)
    bare.experts, bare.interference = {"a": 7.5}, Interference(["a"], [])
    for found in bare.rows:
        found.tasks, found.confusion, found.alpha_scores = {"a": 12.25}, [], {}
    write_report(bare, tmp_path, pictures="none")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    Page(text)
    assert "its expert: 7.5" in text and "perplexity on test rows" in text and "Between the tasks" not in text


@pytest.mark.parametrize(
    ("values", "ends", "step"),
    [((0.2, 0.97), (0.0, 1.0), 0.25), ((7.0, 12.25), (0.0, 15.0), 5.0), ((-0.3, 0.4), (-0.4, 0.4), 0.2)],
)
def test_axes_have_round_ticks_and_reach_over_the_values(values, ends, step):
    axis = Axis.of([*values, float("nan"), float("inf")])
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert axis.ticks[1] - axis.ticks[0] == pytest.approx(step)
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == 100 and 0 <= axis.place(0) <= 100
    assert Axis.of([2, 3], from_zero=False, whole=True).ticks == (2, 3)
    assert Axis.of([0, 9], whole=True).ticks == (0, 5, 10)
    log = Axis.of_logarithms([1 / 128, 1.0])
    assert [log.place(2.0**-i) for i in (7, 0)] == [0, 100] and log.shown(1 / 64) == "1/64"
    assert Axis.of([3.0, 3.0], from_zero=False).place(3.0) == 50


# Measures what a screenshot shows: what is wider than the window, and names and numbers that touch.
_MEASURE = """
<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, .heat") &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.className + e.tagName);
const touching = [];
for (const group of document.querySelectorAll(".ticks, .yticks")) {
  const boxes = [...group.children].map(e => e.getBoundingClientRect());
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) touching.push(group.textContent);
  }));
}
const names = [...document.querySelectorAll(".name")].filter(e => e.scrollWidth > e.clientWidth + 1).length;
const button = document.querySelectorAll(".results button")[5];
button.click();
const sorted = [...document.querySelectorAll(".results .methods tr")].map(e => parseFloat(e.cells[5].textContent));
document.title = JSON.stringify({wide, touching, names, sorted, back: getComputedStyle(document.body).backgroundColor,
  state: button.parentElement.getAttribute("aria-sort")});
</script></body>"""


@pytest.mark.cases(2)
@pytest.mark.extras
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_nothing_collides_and_columns_sort(report, tmp_path, width, dark):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    page, picture = tmp_path / "measured.html", tmp_path / "page.png"
    framed = report[1].replace("</body>", _MEASURE)
    page.write_text(framed, encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=" + ("0" if dark else "1")]
    # A window is at least 500 px wide, also without a head: a narrower page is shown in a frame.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe id=f src="measured.html" width={width} height=6000 frameborder=0></iframe>'
        "<pre id=out></pre><script>f.onload = () => out.textContent = f.contentDocument.title;</script>"
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += [*scheme, "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    options += [f"--window-size={max(width, 500)},6000"]
    for action in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run([browser, *options, action, frame.as_uri()], capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    seen = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout.decode(), re.DOTALL)[1]))
    assert seen["wide"] == seen["touching"] == [] and seen["names"] == 0
    known = [value for value in seen["sorted"] if value is not None]
    assert known == sorted(known, reverse=True) and len(known) == len(report[0].rows) - 1
    assert seen["state"] == "descending"
    assert (sum(map(int, re.findall(r"\d+", seen["back"])[:3])) < 300) == dark
    assert len(set(Image.open(picture).convert("RGB").resize((50, 50)).getdata())) > 20
