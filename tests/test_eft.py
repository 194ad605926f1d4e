"""Judge data that is built from ranked replies: which sets are accepted, what is learned of them, and what is said.

The judge's words are written here; only the sampling is replaced, what reads them and what writes files is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from selfreward_jax import launch, presets
from selfreward_jax.config import from_config_dict
from selfreward_jax.data.chat import encode_text
from selfreward_jax.data.records import Example, Judgment, RankedSet, read_records
from selfreward_jax.errors import UserError
from selfreward_jax.judging import templates
from selfreward_jax.run import Held, Run, read_parts, write_records
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling.engine import Completion
from selfreward_jax.stages import eft

Votes = Sequence[Any]  # of one reply: a score, text, or (text, finish reason) for each judgment
Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    made = launch.open_run(from_config_dict(presets.get("m1", "tiny")), epath.Path(tmp_path_factory.mktemp("eft")))
    with jax.set_mesh(made.mesh):
        yield made


@pytest.fixture
def build(opened: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """`build(sets, seed=0, words=0, **eft fields)` runs the stage; a set is (ranks, the votes of each reply).

    The last reply of the first set has so many `words`, if any are asked for.
    """

    def make(
        sets: Sequence[tuple[Sequence[int], Sequence[Votes]]], seed: int = 0, words: int = 0, **fields: Any
    ) -> dict[str, Any]:
        settings = dataclasses.replace(opened.config.eft, source="build", file="", **fields)
        config = dataclasses.replace(opened.config, eft=settings, seed=seed)
        run = dataclasses.replace(opened, config=config, root=epath.Path(tmp_path), held=Held("sft", "generation", None))
        ranked = [
            RankedSet(f"s{i}", f"Question {i}?", tuple(f"Reply {j} of {i}." for j in range(len(ranks))), tuple(ranks))
            for i, (ranks, _) in enumerate(sets)
        ]
        if words:
            ranked[0] = dataclasses.replace(ranked[0], replies=(*ranked[0].replies[:-1], "word " * words))
        write_records(run.root / "seed" / "eft_train_sets.jsonl", ranked)
        said = [
            [completion(run, vote, f"{i}/{j}/{k}") for k, vote in enumerate(votes)]
            for i, (_, replies) in enumerate(sets)
            for j, votes in enumerate(replies)
        ]

        def canned(engine: Any, sampling: Any, requests: Any, *_: Any) -> Iterator[Any]:
            assert {len(request.keys) for request in requests} == {settings.k}
            width = engines.per_part(engine, requests)
            for part in range(-(-len(requests) // width)):
                yield part, said[part * width : (part + 1) * width], engines.Counts()

        monkeypatch.setattr(engines, "run", canned)
        return eft.make(run)

    return make


def completion(run: Run, vote: Any, name: str) -> Completion:
    text, finish = vote if isinstance(vote, tuple) else (vote, "stop")
    text = f"Reason {name}.\nScore: {text}" if not isinstance(text, str) else text
    ids = (*encode_text(run.chat, text), *((run.chat.end_of_turn,) if finish == "stop" else ()))
    return Completion(ids, (0.0,) * len(ids), finish)


def learned(tmp_path: Path) -> list[Example]:
    return read_records(tmp_path / "m1" / "eft_train.jsonl", Example)


def ones(*scores: Any) -> list[list[Any]]:
    """One judgment for each reply."""
    return [[score] for score in scores]


MIXED = [
    ((0, 1, 2), ones(5, 3, 1)),
    ((2, 0, 1), ones(0, 4, 2)),  # in another order
    ((0, 1, 2), ones(5, 4, 4)),  # a tie
    ((0, 1), ones(4, 4)),
    ((0, 1, 1), ones(4, 2, 3)),  # people told no difference
    ((0, 1), ones(1, 5)),
    ((0, 1), ones(5, "No verdict.")),
    ((0, 1), ones(5, ("Score: 1 because it is wrong and", "length"))),
]


@pytest.mark.parametrize(("ties", "accepted"), [("strict", (0, 1, 4)), ("lenient", (0, 1, 2, 4))])
def test_sets_in_the_order_of_the_humans_are_accepted(build: Build, tmp_path: Path, ties: str, accepted: Any) -> None:
    facts = build(MIXED, ties=ties, max_share=1.0)
    assert facts["sets"] == {
        "accepted": len(accepted), "scores disagree with the human ranking": 6 - len(accepted), "no score for a reply": 1,
        "no judgment of a reply ended": 1,
    }  # fmt: skip
    additive = templates.load("additive")
    wanted = [
        Example(
            f"s{i}/{j}",
            templates.render(additive, f"Question {i}?", f"Reply {j} of {i}."),
            f"Reason {i}/{j}/0.\nScore: {votes[0]}",
            "built",
        )
        for i in accepted
        for j, votes in enumerate(MIXED[i][1])
    ]
    assert learned(tmp_path) == wanted
    assert facts["examples"] == len(wanted) == sum(facts["scores"].values())
    assert facts["scores_before"] == facts["scores"]


def test_all_judgments_are_kept_as_they_were_read(build: Build, tmp_path: Path) -> None:
    facts = build(MIXED, max_share=1.0)
    votes = read_parts(epath.Path(tmp_path) / "m1" / "eft_judgments", Judgment)
    assert [(vote.prompt_id, vote.response_index) for vote in votes] == [
        (f"s{i}", j) for i, (ranks, _) in enumerate(MIXED) for j in range(len(ranks))
    ]
    assert facts["judgments"] == {"sampled": 20, "parsed": 19}
    assert facts["scores_judged"] == {"0": 1, "1": 3, "2": 2, "3": 2, "4": 6, "5": 5, "none: no_statement": 1}


THREE = [
    ((0, 1), [[5, 3, 3], [2, 0, 1]]),  # means 11/3 and 1
    ((0, 1), [[4, 4, 5], [2, 2, 1]]),
    ((1, 0), [[1, ("Score: 2 because it is not", "length"), 4], [5, "None.", 5]]),  # means 7/3 and 5
    ((0, 1), [[5, 3, 4], [3, 1, ("Score: 2 because it is not", "length")]]),  # 3 and 1 are as near to 2
]


def test_the_target_is_the_judgment_nearest_the_mean(build: Build, tmp_path: Path) -> None:
    facts = build(THREE, k=3, max_share=1.0)
    assert facts["sets"] == {"accepted": 4}
    targets = {example.id: example.response for example in learned(tmp_path)}
    assert targets == {
        "s0/0": "Reason 0/0/1.\nScore: 3", "s0/1": "Reason 0/1/2.\nScore: 1",
        "s1/0": "Reason 1/0/0.\nScore: 4", "s1/1": "Reason 1/1/0.\nScore: 2",
        "s2/0": "Reason 2/0/0.\nScore: 1", "s2/1": "Reason 2/1/0.\nScore: 5",
        "s3/0": "Reason 3/0/2.\nScore: 4", "s3/1": "Reason 3/1/0.\nScore: 3",
    }  # fmt: skip


SAME_TARGETS = [
    ((0, 1), [[4, 4, 5], [4, 3, 4]]),  # means 13/3 and 11/3, both would teach a 4
    ((0, 1, 2), [[5, 5, 5], [4, 4, 5], [4, 3, 4]]),
    ((0, 1), [[5, 5, 5], [1, 1, 1]]),
    ((0, 1), [[4, 4, 2], [3, 3, 3]]),
]
UNLIKE = "mean scores agree with the human ranking, those of the targets do not"


def test_what_is_learned_agrees_with_the_humans_as_the_means_do(build: Build, tmp_path: Path) -> None:
    facts = build(SAME_TARGETS, k=3, max_share=1.0)
    assert facts["sets"] == {"accepted": 2, UNLIKE: 2}
    assert {example.id for example in learned(tmp_path)} == {"s2/0", "s2/1", "s3/0", "s3/1"}
    facts = build(SAME_TARGETS, k=3, max_share=1.0, ties="lenient")
    assert facts["sets"] == {"accepted": 3, UNLIKE: 1}  # two equal targets order nothing, three still do
    scores = {example.id: example.response[-1] for example in learned(tmp_path) if example.id.startswith("s1/")}
    assert scores == {"s1/0": "5", "s1/1": "4", "s1/2": "4"}


SKEWED = [((0, 1), ones(4, 3))] * 8 + [((0, 1), ones(4, 1))] * 4 + [((0, 1), ones(5, 3))] * 2


def test_the_most_common_score_is_thinned_to_the_share(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = build(SKEWED, max_share=0.4)
    assert facts["scores_before"] == {"1": 4, "3": 10, "4": 12, "5": 2}
    assert facts["scores"] == {"1": 4, "3": 10, "4": 10, "5": 2} and facts["examples"] == 26
    first = learned(tmp_path)
    assert [example.response[-1] for example in first].count("4") == 10
    order = [int(example.id[1:].split("/")[0]) for example in first]
    assert order == sorted(order)
    build(SKEWED, max_share=0.4)
    assert learned(tmp_path) == first
    build(SKEWED, max_share=0.4, seed=1)
    assert learned(tmp_path) != first
    facts = build(SKEWED, max_share=0.3)
    assert facts["scores"] == {"1": 4, "3": 10, "4": 10, "5": 2}  # not below the next most common
    capsys.readouterr()


def test_each_table_of_the_report_has_one_unit(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    build(
        [*SKEWED, ((0, 1), ones(1, "None.")), ((0, 1), ones(1, ("Sco", "length"))), ((0, 1), ones(1, 2))],
        max_share=0.4,
    )
    printed = capsys.readouterr().out
    assert printed[printed.index("[m1/eft] 17 ranked sets") :].splitlines() == [
        "[m1/eft] 17 ranked sets",
        "      14   82.4%  accepted",
        "       2   11.8%  no score for a reply",
        "       1    5.9%  scores disagree with the human ranking",
        "[m1/eft] 34 judgments, 32 with a score (94.1%)",
        "       1  without: cut_off",
        "       1  without: no_statement",
        "[m1/eft] 28 judged replies of accepted sets, 26 after thinning",
        "  score  accepted    kept",
        "  1             4       4",
        "  3            10      10",
        "  4            12      10",
        "  5             2       2",
    ]


def test_a_share_that_is_not_reached_is_said(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    facts = build([((0, 1), ones(4, 3))] * 5, max_share=0.4)
    assert facts["scores"] == {"3": 5, "4": 5}
    line = "  the most common has 50.0%: it is not thinned below the next most common"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_nothing_accepted_says_what_became_of_the_sets(build: Build) -> None:
    with pytest.raises(UserError) as caught:
        build([((0, 1), [[4, 4, 5], [4, 3, 4]]), ((0, 1), [["No."] * 3, [1, 1, 1]])], k=3)
    assert caught.value.args == (
        f"m1/eft: none of 2 ranked sets gave judge examples ({UNLIKE}: 1, no score for a reply: 1);"
        " use --config.eft.source=file, or more --config.eft.train_sets",
    )


def test_a_set_with_a_reply_over_the_context_is_not_judged(build: Build, opened: Run) -> None:
    # The judge's words are given in the order of the requests, of which the first set makes none.
    facts = build([((0, 1), []), ((0, 1), ones(5, 1))], words=opened.source.config.context, max_share=1.0)
    assert facts["sets"] == {"longer than the context": 1, "accepted": 1}
    assert facts["scores"] == {"1": 1, "5": 1} and facts["judgments"] == {"sampled": 2, "parsed": 2}
