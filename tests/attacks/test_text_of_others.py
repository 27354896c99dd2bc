"""Text of jobs, errors, commits and people wants to be markup where it is shown: in questions, reports and MLflow."""

from __future__ import annotations

import html as characters
import re
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.support.html_pages import checked
from torchworker.contract import Mismatch, ValidateResult, Verdict
from train_and_ship.registry.channels.moves import Mover
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.report.description import describe
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import Lines, Page, Section, Text, markdown
from train_and_ship.registry.report.parity_failure import parity_report
from train_and_ship.registry.text import Mark, Table, escaped, fenced
from train_and_ship.registry.tracking.runs import TAG_LENGTH, note_of_end
from train_and_ship.tasks.approval import move_question
from train_and_ship.tasks.train import describe_progress

ATTACKS = [
    "[all gates passed](http://elsewhere.example/)",
    "![a picture](http://elsewhere.example/x.png)",
    "<http://elsewhere.example/> and <ada@elsewhere.example>",
    "see http://elsewhere.example/x or www.elsewhere.example",
    "write to ada@elsewhere.example, or to @ada",
    "<img src=http://elsewhere.example/x.png>",
    "<iframe src='http://elsewhere.example/'></iframe>",
    "<b>bold</b> </td></table> <!-- what follows",
    "# All gates passed",
    "so\r## All gates passed\r\n- one",
    "approved\n===",
    "approved\n---\n> by grace",
    "- one\n+ two\n* three\n1. four\n12) five",
    "**approved** and __approved__ and _so_ and ~~not~~ and `so`",
    "\\[x](http://elsewhere.example/) and \\<b>",
    "&lt;b&gt; &#91;x](y) &amp;",
    "a | b\n--- | ---\nc | d",
    "| a |\n| :-- |\n| b |",
    "[x]: http://elsewhere.example/\n\n[x]",
    "```\nno code\n```",
    "left open <",
    "[1]",
    "[1]: http://elsewhere.example/",
    "[3, 1](http://elsewhere.example/) and ![2][1]",
]
PLAIN = [
    "vs_live >= 0.97, train_loss <= 8",
    "-0.01 (-1.0%)",
    "ada@host: errors since 14:00",
    "4.2 of 5 & more",
    "0.97",
    "[3, 1] expected 0.5",
]
FORBIDDEN = re.compile(r"<(?!/?(p|br|table|thead|tbody|tr|th|td|ul|li|code|pre|strong)\b)|<li>\s*<", re.IGNORECASE)


def rendered(text: str) -> str:
    """As a page with GitHub's markdown would; raw HTML is let through."""
    return str(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


def shown(document: str) -> str:
    """What a reader sees."""
    return " ".join(characters.unescape(re.sub(r"<[^>]*>", "", document)).split())


@pytest.mark.parametrize("text", [*ATTACKS, *PLAIN])
def test_it_is_shown_as_it_is_and_nothing_else(text: str) -> None:
    document = rendered(escaped(text))
    assert re.fullmatch(r"(<p>[^<]*</p>\s*)*", document), document
    assert shown(document) == " ".join(text.split())
    # Some pages make links of addresses by themselves.
    assert not re.search(r"\w://|www\.\w|\w@\w+\.\w|(^|\s)@\w", escaped(text))


@pytest.mark.parametrize("text", ATTACKS)
def test_a_cell_is_shown_as_it_is_and_ends_no_row(text: str) -> None:
    table = Table(header=("name", text), rows=[(text, Mark(text=text, good=False))], notes=[text])
    document = rendered(table.markdown())
    assert not FORBIDDEN.search(document), document
    assert document.count("<tr>") == 2 and document.count("<td") == 2 and document.count("<li>") == 1
    assert shown(document).count(" ".join(text.split())) == 4


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_markup_reads_the_same_where_nothing_renders_it(text: str) -> None:
    assert escaped(text) == text


def test_lines_in_fences_cannot_close_them() -> None:
    for text in ("``` \nout", "````\n<b>out</b>\n````", "`" * 20):
        document = rendered(fenced(text))
        assert document.count("<pre>") == 1 and document.rstrip().endswith("</code></pre>")
        assert (
            characters.unescape(re.sub(r"^<pre><code[^>]*>|</code></pre>$", "", document.strip())).strip()
            == text.strip()
        )


@pytest.mark.parametrize("text", ATTACKS)
def test_a_report_shows_it_in_both_forms(text: str) -> None:
    blocks = [Text(text=text), Lines(text=text), Table(header=(text, "value"), rows=[(text, text)])]
    page = Page(
        title=text, verdict="failed", good=False, intro=text, facts=Table(rows=[(text, text)]),
        sections=[Section(title=text, blocks=blocks)],
    )  # fmt: skip
    document = re.sub(r"<h[12]>|</h[12]>", "", rendered(" ".join(markdown(page).split("\r"))))
    assert not re.search(r"<(a|img|iframe|b|em|script|blockquote|ol|hr|del)\b", document), document
    assert checked(html(page)).links == []


def test_the_page_of_a_version_in_mlflow_shows_it() -> None:
    for text in ATTACKS:
        one = text.replace("\n", " ")
        verdict = Verdict(format="onnx", gate="accuracy", case=one, measured=None, limit=one, passed=False, note=text)
        said = describe(
            model="digits", release="r-1", formats={"onnx": "model.onnx"}, sizes={"model.onnx": 1},
            result=ValidateResult(
                verdicts=[verdict], metrics={"onnx": {one: 0.5}}, reference="the model", validation_samples=9
            ),
            training={one: 1.0}, links={"Prefect run": "http://127.0.0.1:4200/x"}, captured={"onnx": text},
            left_out={"pt2": text}, shipped=text,
        )  # fmt: skip
        document = rendered(said)
        assert document.count("<a ") == 1 and "http://127.0.0.1:4200/x" in document
        assert not re.search(r"<(img|iframe|b|em|script|blockquote|ol|hr|del)\b", document), document


def test_the_note_of_a_run_that_failed_shows_it() -> None:
    for text in (*ATTACKS, "```\n<b>out</b>\n```\n" + "long\n" * TAG_LENGTH):
        note = note_of_end("FAILED", text)
        document = rendered(note)
        assert not re.search(r"<(a|img|iframe|b|em|script|h\d|table)\b", document), document
        assert document.count("<pre>") == 1 and len(note) <= TAG_LENGTH


def test_the_report_of_parity_and_the_progress_of_a_training_show_it() -> None:
    for text in ATTACKS:
        one = text.replace("\n", " ")
        mismatch = Mismatch(format="onnx", probe=one, output=one, ratio=2.0, note=text, distribution=[one])
        for said in (parity_report("digits", [mismatch], {"onnx": text}), describe_progress(one, {})):
            document = rendered(said)
            assert not re.search(r"<(a|img|iframe|b|script|del)\b", document), document


def test_the_question_to_a_person_shows_who_asks_and_why_as_text() -> None:
    for text in ATTACKS:
        live = Pointer(
            model="digits", channel="prod", generation=1, release="0" * 20, manifest_sha256="", previous=None,
            nonce="n", moved_at="now", moved_by=text, reason=text, flow_run="", mlflow_version="",
        )  # fmt: skip
        channel = SimpleNamespace(model="digits", name="prod")
        verified: Any = SimpleNamespace(target=SimpleNamespace(release="1" * 20, channel=channel, live=live))
        mover = Mover(by=text, why=text)
        request: Any = SimpleNamespace(mover=mover)
        document = rendered(move_question(request, verified, Table(rows=[(text, text)]), ["signature"]))
        assert not re.search(r"<(a|img|iframe|b|em|script|blockquote|ol|ul|hr|del|h1|h3)\b", document), document
        assert document.count("<h2>") == 1
        assert shown(document).count(" ".join(text.split())) >= 4
