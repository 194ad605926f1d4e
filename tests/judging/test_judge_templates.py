"""Judge prompts: the published wording, and texts that cannot leave their place."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.errors import UserError
from selfreward_jax.judging import templates

FAST = settings(deadline=None, max_examples=100, database=None)
TAG = re.compile(r"<\s*/?\s*response\b", re.IGNORECASE)
# Texts made of what an attack is made of, and of anything.
PARTS = [
    "<response>",
    "</response>",
    "</Response >",
    "< /RESPONSE",
    "<\\/response>",
    "<",
    "\\",
    "/",
    "response",
    " ",
    "\n",
    templates.INSTRUCTION,
    templates.RESPONSE,
    "Score: 5",
    "<responses>",
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=8).map("".join)


@pytest.fixture(scope="module")
def additive():
    return templates.load("additive")


def test_the_wording_is_pinned(additive):
    assert hashlib.sha256(additive.text.encode()).hexdigest() == (
        "2ee1f2185a36b0bace155bb1c091c7541a1f289385fb9f346bca46785ac9850e"
    )
    # The same words on one line, as the paper prints Figure 2.
    assert hashlib.sha256(" ".join(additive.text.split()).encode()).hexdigest() == (
        "7e2fb546c74e6cce574c09743c204c540c7529530bbf7859abd841337670e9e8"
    )
    assert (additive.low, additive.high) == (0, 5)


def test_the_shape(additive):
    paragraphs = additive.text.split("\n\n")
    assert [len(paragraph.split("\n")) for paragraph in paragraphs] == [1, 5, 4, 3, 1]
    assert all(line.startswith("- ") for line in paragraphs[1].split("\n") + paragraphs[3].split("\n")[1:])
    assert paragraphs[2] == "User: <INSTRUCTION_HERE>\n<response>\n<RESPONSE_HERE>\n</response>"
    assert not re.search(r"[ \t]$", additive.text, re.MULTILINE) and not additive.text.endswith("\n")
    assert "'" not in additive.text and '"' not in additive.text  # the paper's quotes are curly


def test_a_plain_text_is_put_in_unchanged(additive):
    prompt = templates.render(additive, "Why is 2 < 3?", "Because.\n\nScore: 5")
    assert "User: Why is 2 < 3?\n<response>\nBecause.\n\nScore: 5\n</response>\n" in prompt


@FAST
@given(instruction=TEXTS, response=TEXTS)
def test_no_text_breaks_out(additive, instruction, response):
    prompt = templates.render(additive, instruction, response)
    assert [match.group() for match in TAG.finditer(prompt)] == ["<response", "</response"]
    head, _, rest = prompt.partition("\n<response>\n")
    body, _, _ = rest.partition("\n</response>\n")
    assert head.endswith("User: " + templates.neutralise(instruction))
    assert body == templates.neutralise(response)


@FAST
@given(TEXTS)
def test_neutralising_can_be_undone(text):
    safe = templates.neutralise(text)
    assert re.sub(r"<\\(?=\\*\s*(?:/\s*)?response\b)", "<", safe, flags=re.IGNORECASE) == text
    assert not TAG.search(safe)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("</response>", "<\\/response>"),
        ("<Response>", "<\\Response>"),
        ("< / RESPONSE >", "<\\ / RESPONSE >"),
        ("<\\/response>", "<\\\\/response>"),
        ("<response id=1", "<\\response id=1"),
        ("<responses>", "<responses>"),
        ("</p> response", "</p> response"),
    ],
)
def test_which_tags_are_neutralised(text, safe):
    assert templates.neutralise(text) == safe


@pytest.mark.parametrize(
    "attack", ["<" * 100_000, "<" + " " * 100_000, "<" + "\\" * 100_000, "< / response" * 10_000]
)
def test_long_texts_take_linear_time(additive, attack):
    assert attack[:1] in templates.render(additive, attack, attack)


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("Réponse: <RESPONSE_HERE>\r\nQ: <INSTRUCTION_HERE>\r\n".encode())
    mine = templates.load(path, low=1, high=10)
    assert mine == templates.Template(str(path), "Réponse: <RESPONSE_HERE>\nQ: <INSTRUCTION_HERE>", 1, 10)
    assert templates.render(mine, "<RESPONSE_HERE>", "\\1") == "Réponse: \\1\nQ: <RESPONSE_HERE>"


def test_templates_that_cannot_be_used(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("<RESPONSE_HERE> <RESPONSE_HERE>")
    with pytest.raises(UserError) as caught:
        templates.load(path, low=5, high=5)
    assert len(caught.value.args) == 3
    assert "<INSTRUCTION_HERE> must stand in a judge template once, found 0 times" in str(caught.value)
    assert "<RESPONSE_HERE> must stand in a judge template once, found 2 times" in str(caught.value)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        templates.load(path)
    with pytest.raises(UserError, match="neither a built-in"):
        templates.load("additiv")
    with pytest.raises(UserError, match="'additive' scores 0 to 5, not 0 to 10"):
        templates.load("additive", high=10)


def test_a_changed_built_in_is_noticed(monkeypatch):
    monkeypatch.setitem(templates._BUILT_IN, "additive", ("additive.txt", "0" * 64, 0, 5))
    with pytest.raises(UserError, match="was changed"):
        templates.load("additive")
