"""What a report's files hold, also where a model, a data set or a name is hostile, and what a browser makes of the pages."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flexgen_helm.cli import main
from flexgen_helm.reports.presentation.markdown import escaped, table
from flexgen_helm.reports.presentation.plots import _pareto
from flexgen_helm.reports.presentation.tables import BEGINS, WIDE, write_csv
from flexgen_helm.reports.presentation.words import FIGURES, TABLES, labels, written
from tests.reports.synthetic import Answer, Suite

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "{{ 7 * 7 }}",
    "| a | `b` | **c** [d](javascript:alert(4)) http://x.example www.x.example",
    '=HYPERLINK("http://x")',
    "@SUM(A1)",
    "\t=1+1",
    "$\\frac{1}{",
    "]]> \u202e \x00 \x1b[31m \ud800",
    "# heading\n\n---\n1. item",
)
MODEL = "flexgen/org/<b>$m$&amp;"
PLOTS = ("accuracy_against_bits", "paired_differences", "accuracy_against_throughput", "flips")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def report(folder: Path) -> Path:
    """Returns the folder of a report on runs in which everything that can be is hostile."""
    suite = folder / "<i>suite"
    for name, score in ((MODEL, 1.0), (f"{MODEL}@w4", 0.0), (f"{MODEL}@w8", 1.0)):
        answers = [
            Answer(
                text=text, score=score, prompt=f"{{{{instance}}}} {text.replace('{', '{{').replace('}', '}}')}", instance=text
            )
            for text in HOSTILE
        ]
        choices = ("<u>one", "=two", "three", "four")
        Suite(suite, name).run("mmlu:subject=<script>alert(5)<", answers, choices=choices)
        Suite(suite, name).run("hs:x=1", [Answer(score=1.0, logprobs=(-1.0,) * 4)], method="multiple_choice_separate_original")
    command = ["report", "--baseline", f"{suite}:{MODEL}", "--candidates", str(suite), "--out", str(folder / "out")]
    assert main(command) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return report(tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Names of tags, their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


def test_all_files_are_there(out: Path) -> None:
    plots = {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == {
        "report.html",
        "flips.html",
        "report.md",
        "pairs.csv",
        "figures.csv",
        *plots,
    }


def test_pages_hold_hostile_texts_as_text(out: Path) -> None:
    scripts = {"report.html": 1, "flips.html": 2}
    for name, count in scripts.items():
        page = Page((out / name).read_text())
        assert page.tags.count("script") == count
        assert set(page.tags).isdisjoint({"b", "i", "u", "iframe", "object", "a:href"})
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert all(value.startswith("data:") for key, value in page.attributes if key == "src")
        links = {value for key, value in page.attributes if key == "href"}
        assert links <= {"data:,", "flips.html", "report.html", "pairs.csv", "figures.csv"}
    shown = Page((out / "flips.html").read_text()).text
    for text in HOSTILE[:7]:
        assert text in shown
    assert "49" not in shown


def test_nothing_is_loaded_from_a_network(out: Path) -> None:
    for name in ("report.html", "flips.html"):
        text = (out / name).read_text()
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
        assert "default-src 'none'" in text
        assert "@import" not in text


def test_pictures_are_well_formed_and_have_no_script(out: Path) -> None:
    for name in PLOTS:
        root = ElementTree.parse(out / f"{name}.svg").getroot()
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert "svg" in root.tag
        assert tags.isdisjoint({"script", "foreignObject", "a", "image"})
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_holds_hostile_texts_as_text(out: Path) -> None:
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table"]).render((out / "report.md").read_text())
    page = Page(rendered)
    allowed = {"h1", "h2", "ul", "li", "p", "table", "thead", "tbody", "tr", "th", "td", "sup", "br", "img"}
    assert set(page.tags) <= allowed
    assert {value for key, value in page.attributes if key in ("src", "href")} == {f"{name}.png" for name in PLOTS}
    assert "<script>alert(1)</script>" in page.text
    assert "[d](javascript:alert(4)) http://x.example www.x.example" in page.text


@given(st.text())
def test_escaped_markdown_is_the_text_itself(text: str) -> None:
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    rendered = (
        MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table"]).render(table(["x"], [[escaped(text)]]))
    )
    page = Page(rendered)
    assert page.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert page.text.split("\nx\n")[1].strip() == plain


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_no_cell_of_a_csv_is_a_formula(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.csv"
        write_csv(path, pd.DataFrame({"x": texts, "n": [-1.0] * len(texts)}))
        with path.open(newline="", encoding="utf-8") as stream:
            cells = [row["x"] for row in csv.DictReader(stream)]
    assert not [cell for cell in cells if cell.lstrip(" ").startswith((*BEGINS, *WIDE))]


def test_pairs_of_a_report_have_no_formula_and_all_rows(out: Path) -> None:
    with (out / "pairs.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * (len(HOSTILE) + 1)
    texts = [
        value for row in rows for name, value in row.items() if not name.startswith(("score", "logprob", "answer_logprob"))
    ]
    assert not [text for text in texts if text.startswith(tuple("=+-@\t\r"))]


def test_short_names_of_runs_differ() -> None:
    names = [
        "mmlu:subject=a,method=multiple_choice_joint",
        "mmlu:subject=a,method=multiple_choice_separate",
        "hs:dataset=x,method=y",
    ]
    assert list(labels(names).values()) == [*names[:2], "hs x"]


def test_every_figure_of_a_table_has_words_and_every_number_is_written() -> None:
    assert {name for columns in TABLES.values() for name in columns} <= FIGURES.keys()
    for name in FIGURES:
        for value in (0.0, 1.0, 0.5, 123456789.0):
            assert written(name, value, float("nan"), float("nan"))
    assert written("recovery", 98.7654, 97.1, 100.0) == "98.77 % [97.10, 100.00]"
    assert written("weight_bytes_device", 3 * 2.0**30, float("nan"), float("nan")) == "3 GiB"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_the_pareto_front_is_what_no_other_beats(points: list[tuple[float, float]]) -> None:
    expected = {
        one for one in points if not any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in points)
    }
    assert set(_pareto(points)) == expected


PROBE = """
<script>
const say = (text) => document.body.setAttribute("data-probe", (document.body.dataset.probe || "") + text + ";");
const set = (name, value) => {
  const control = document.querySelector(`[name=${name}]`);
  control.value = value;
  control.dispatchEvent(new Event("input"));
};
const shown = () => Array.from(document.querySelectorAll("tbody")[0].rows).filter((row) => !row.hidden);
const column = (number) => shown().map((row) => row.cells[number].dataset.sort ?? row.cells[number].textContent);
say("width " + (document.documentElement.scrollWidth <= innerWidth));
%s
</script>
"""


def browse(page: Path, script: str, width: int) -> str:
    """Opens a page with a script in it, and returns what the script said; a line on the console is an error."""
    assert BROWSER is not None
    probed = page.with_name(f"probed_{page.name}")
    probed.write_text(page.read_text().replace("</body>", PROBE % script + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *flags, profile, "--virtual-time-budget=2000", "--dump-dom", probed.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "CONSOLE" not in finished.stderr, finished.stderr
    found = re.search('data-probe="([^"]*)"', finished.stdout)
    assert found is not None
    return found[1]


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to open the pages in")
@pytest.mark.parametrize("width", [1280, 500])
def test_pages_open_filter_and_sort_in_a_browser(out: Path, tmp_path: Path, width: int) -> None:
    for name in ("report.html", "flips.html"):
        shutil.copy(out / name, tmp_path)
    said = browse(
        tmp_path / "report.html",
        """
        const pictures = Array.from(document.images);
        Promise.all(pictures.map((picture) => picture.decode())).then(() => say("pictures " + pictures.length));
        set("configuration", "@w4");
        say("lines " + shown().length);
        set("configuration", "");
        document.querySelectorAll("th button")[4].click();
        const numbers = column(4).filter((text) => text !== "").map(Number);
        say("sorted " + numbers.every((value, at) => !at || numbers[at - 1] <= value));
        """,
        width,
    )
    assert said.split(";")[:-1] == ["width true", "lines 4", "sorted true", "pictures 4"]
    said = browse(
        tmp_path / "flips.html",
        """
        say("rows " + shown().length);
        set("change", "lost");
        say("lost " + shown().length);
        const search = document.querySelector("input");
        search.value = "ALERT(2)";
        search.dispatchEvent(new Event("input"));
        say("found " + shown().length);
        search.value = "";
        search.dispatchEvent(new Event("input"));
        const details = document.querySelector("details");
        details.addEventListener("toggle", () => say("prompt " + details.querySelector("pre").textContent.length));
        details.open = true;
        """,
        width,
    )
    assert re.fullmatch(rf"width true;rows {len(HOSTILE)};lost {len(HOSTILE)};found 1;prompt [1-9]\d*;", said)
