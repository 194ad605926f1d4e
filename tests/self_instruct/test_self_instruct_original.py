"""The faithful path against Self-Instruct's rules, written down a second time: the same drops for the same reasons.

The reference follows the description of Wang et al. (2023) and their published code's behaviour rule by rule, with
rouge_score itself for novelty. It shares nothing with the package.
"""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from selfreward_jax.self_instruct.filters import REASONS, RougeIndex, faithful, filter_batch
from selfreward_jax.self_instruct.prompt import split_completion_faithful

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
STOPS = ["\n\n", "\n16", "16.", "16 ."]
UNSUITABLE = ["image", "images", "graph", "graphs", "picture", "pictures", "file", "files"]
UNSUITABLE += ["map", "maps", "draw", "plot", "go to"]
SEEDS = [
    "Name three tall trees that grow in the north of Europe.",
    "Explain to a child why the sky is blue during the day.",
    "Give me a recipe for a soup with lentils, carrots and one onion",
    "Is the following sentence a question or a statement?",
]


def sampled(text, finish_reason):
    """What the original's sampler returns: it writes on until its text ends in a stop, which it leaves out."""
    for end in range(len(text) + 1):
        for stop in STOPS:
            if text[:end].endswith(stop):
                return text[: end - len(stop)], "stop"
    return text, finish_reason


def original(completions, pool):
    """A (normalised item, reason or None) for each item of the completions; `pool` grows by the accepted ones."""
    decisions = []
    for text, finish_reason in completions:
        text, finish_reason = sampled(text, finish_reason)
        if finish_reason == "length":
            continue
        for item in re.split(r"\n\d+\s?\. ", text):
            item = re.sub(r"\s+", " ", item).strip().capitalize()
            reason = against(item)
            if reason is None and max(SCORER.score(item, other)["rougeL"].fmeasure for other in pool) > 0.7:
                reason = "similar"
            if reason is None:
                pool.append(item)
            decisions.append((item, reason))
    return decisions


def against(item):
    if item == "":
        return "empty"
    if len(item.split()) <= 3:
        return "too_short"
    if len(item.split()) > 150:
        return "too_long"
    for word in UNSUITABLE:
        if re.search(rf"\b({word})\b", item, re.IGNORECASE):
            return "keyword"
    if item.startswith("Write a program"):
        return "write_a_program"
    if item[0] in string.punctuation:
        return "punctuation"
    return None if item[0].isascii() else "non_ascii"


def ours(completions):
    """The same by the package, and the accepted items and drops when all items go in as one batch."""
    items = [item for text, reason in completions for item in split_completion_faithful(text, reason)[0]]
    index, decisions = RougeIndex(texts=SEEDS), []
    for item in items:
        accepted, drops = filter_batch([item], index, faithful)
        decisions.append((faithful(item), None) if accepted else (faithful(item), *drops))
    return decisions, filter_batch(items, RougeIndex(texts=SEEDS), faithful)


def check(completions):
    """Compares the two, and returns the reasons that occurred."""
    wanted = original(completions, [*SEEDS])
    decisions, (accepted, drops) = ours(completions)
    assert decisions == wanted
    assert accepted == [item for item, reason in wanted if reason is None]
    reasons = [reason for _, reason in wanted if reason is not None]
    assert drops == {reason: reasons.count(reason) for reason in reasons}
    return {reason for _, reason in wanted}


LONG = "Repeat " + "these few words " * 49  # 148 words

AWKWARD = [
    # Where the text is split, and where it ends.
    ("", "stop"),
    (" ", "stop"),
    (" Name a river that flows north.", "stop"),
    (" Name a river that flows to the south.", "length"),
    (" One for all of them.\n10. Two for the show.\n11. Three to get", "length"),
    (" Count the days in June.\n10. Sing a song for Ann\n11.Tell me what an atom is", "stop"),
    (" Count the days of May, please.\n10 . Say something nice to me\n11  . Say something nasty to me", "stop"),
    (" Compare tea and coffee for me.\n10.\tTabs are not spaces here\n11. Fine words butter no parsnips", "stop"),
    (" List my options here:\n1. the first of them\n2. the second of them\n10. Why do cats purr at night?", "stop"),
    (" Which way does water swirl?\n10. \n11. \n12. What is left of it?", "stop"),
    ("\n10. Which number comes after nine?\n99999999999999999999. And which one after that?", "stop"),
    (" Why is it so late?\r\n10. Because of the long day\r\n11. A second line of it", "stop"),
    (" How do I fold a shirt?\n١٠. How do I fold a towel?\n१२. Where do socks vanish to", "stop"),
    (" What came after the war?\n\n10. What came before the war?", "length"),
    ("\n\n Too late for any task here", "stop"),
    (" Who ruled Rome back then?\n \n10. Who ruled Egypt back then?", "stop"),
    (" Tell me of the year 2016. It was long.\n10. Tell me something else now", "length"),
    (" Tell me of the year 2016 . It was long.", "length"),
    (" Tell me of the year 2016, and of 1600.", "length"),
    (" Rate this film for me\n15. Rate this book for me\n16. Rate this play for me", "length"),
    (" Rate this song for me\n15. Rate that opera for us\n160 and more of them", "length"),
    (" Add six and ten: 6 + 10 = 16\n10. Add six and eleven now", "stop"),
    # Normalisation.
    ("  DNA works   in\tPython \n to Bob  ", "stop"),
    (" What\xa0is\u2003a\u2028thin\x1fspace\x85called?", "stop"),
    (" what's a zero\u200bwidth space for?", "stop"),
    (" ßtrange letters open this line", "stop"),
    (" ŉight falls over the town", "stop"),
    (" ǆungla begins with a digraph", "stop"),
    (" İstanbul or Ankara for lunch?", "stop"),
    (" ΟΔΟΣ ends in a final sigma", "stop"),
    # Length in words.
    (" Three words only", "stop"),
    (" Four words are enough", "stop"),
    (" one\n10. a b c\n11. a b c d\n12. - - - -", "stop"),
    (f" {LONG} to you", "stop"),
    (f" {LONG} back to you", "stop"),
    (f" {LONG} to me and us\n10. Now something short instead", "stop"),
    # Keywords: whole words, in any case.
    (" Describe the IMAGE above in words", "stop"),
    (" Describe the images, then the moods", "stop"),
    (" Turn my profile into a poem", "stop"),
    (" Draw up a contract for us\n10. Drawing is what I love", "stop"),
    (" What is the plot of Hamlet?\n10. Who is plotting against Hamlet?", "stop"),
    (" Write a roadmap for our team\n10. Write about a map_maker's day", "stop"),
    (" Should I go to bed now?\n10. Should I go\n to bed early?\n11. Where do I go today?", "stop"),
    (" Explain the paragraph about graph-theory\n10. Fold my file's edges down", "stop"),
    (" Name a bitmap format and its use\n10. Pictures: which ones do sell?", "stop"),
    (" Translate fichier (a ﬁle) to German\n10. Is mapſ spelled with a long s?", "stop"),
    # "Write a program" opens the line, as `capitalize` leaves it.
    (" Write a program that sorts lists", "stop"),
    (" WRITE A PROGRAM FOR MY WEDDING\n10. write a\nprogramme of four events", "stop"),
    (" Please write a program for me\n10. Write an app that counts sheep", "stop"),
    # First characters.
    (" (Optional) tell me about owls\n10. - tell me about newts\n11. _tell me about frogs_", "stop"),
    (' "To be or not" is from what?\n10. `ls` lists what exactly here?', "stop"),
    (" ¿Dónde está la biblioteca hoy?\n10. “Quotes” are not plain here", "stop"),
    (" Éric wants a new hat\n10. 你好 世界 朋友 们 好\n11. 7 ways to wash a car", "stop"),
    (" 🎉 plan a party for Ann\n10. £5 buys how many eggs?\n11. $5 buys how many eggs?", "stop"),
    # Novelty: seeds, earlier batches, this batch, and the border itself (7 of 10 tokens).
    (" name THREE tall trees that grow in the north of Europe", "stop"),
    (" Name three tall trees that grow in the south of Asia.", "stop"),
    (" Name a river that flows north, please\n10. Does water swirl which way?", "stop"),
    (" Alpha beta gamma delta epsilon zeta eta theta iota kappa", "stop"),
    (" Alpha beta gamma delta epsilon zeta eta un deux trois", "stop"),
    (" Alpha beta gamma delta epsilon zeta eta theta ein zwei", "stop"),
    (" Kappa iota theta eta zeta epsilon delta gamma beta alpha", "stop"),
    (" a 你好 世界 朋友 们\n10. a 再见 世界 朋友 们\n11. x 再见 世界 朋友 们", "stop"),
    (" Buy milk, buy eggs, buy milk\n10. Buy milk, buy eggs, buy milk, buy ham, buy milk", "stop"),
]


def test_awkward_completions():
    assert len(AWKWARD) >= 40
    assert check(AWKWARD) == {None, *REASONS} - {"near_evaluation"}


@pytest.mark.parametrize("completion", AWKWARD, ids=lambda completion: repr(completion[0][:30]))
def test_each_alone(completion):
    check([completion])


WORDS = [
    *("name", "Three", "tall", "trees", "that", "grow", "in", "the", "north", "of", "europe", "Explain", "to", "a"),
    *(
        "child",
        "why",
        "sky",
        "is",
        "blue",
        "write",
        "Write",
        "program",
        "WRITE A PROGRAM",
        "go",
        "to",
        "Plot",
        "maps",
    ),
    *("mapped", "image", "Draw", "é", "ß", "(", "-", "7", "DNA", "16", "你好", "ﬁle"),
]
GAPS = st.sampled_from([" "] * 12 + ["  ", "\n", "\t", "\xa0", "\x1f", "\n\n", ", ", "-", "\u2028"])
OPENINGS = st.sampled_from([""] * 9 + ["Write a program ", "write a\n", "(", "É", " "])
MARKS = st.sampled_from(
    [*(f"\n{number}. " for number in range(8, 16)), "\n10 . ", "\n11.", "\n1. ", "\n16. ", "\n٣. ", "\n- "]
)


@st.composite
def items(draw):
    """A few words, or a seed with some of its words changed, so that both novelty verdicts are frequent."""
    if draw(st.booleans()):
        parts = draw(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12))
    else:
        parts = draw(st.sampled_from(SEEDS)).split()
        for place in draw(st.lists(st.integers(0, len(parts) - 1), max_size=5)):
            parts[place] = draw(st.sampled_from(["", "other", *WORDS]))
    return draw(OPENINGS) + "".join(part + draw(GAPS) for part in parts)


@st.composite
def written(draw):
    """A completion: items, each with some mark before it."""
    text = draw(items())
    for item in draw(st.lists(items(), max_size=4)):
        text += draw(MARKS) + item
    return " " + text, draw(st.sampled_from(["stop", "stop", "length"]))


def test_generated_completions():
    seen = set()

    @settings(deadline=None, max_examples=300, database=None, derandomize=True)
    @given(st.lists(written() | st.tuples(st.text(max_size=60), st.sampled_from(["stop", "length"])), max_size=4))
    def compare(completions):
        seen.update(check(completions))

    compare()
    assert seen >= {None, *REASONS} - {"near_evaluation", "too_long"}
