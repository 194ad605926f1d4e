"""The novelty filter of Self-Instruct (paper 3.1.3) side by side with rouge_score, in one process on one core.

All times are the processor's, so that other work on the machine counts little.

The rival is what the original does: `RougeScorer(["rougeL"], use_stemmer=False).score` of a candidate with every
prompt of the pool, and the candidate is dropped if the greatest F is above 0.7. It is measured as the original calls
it, and with tokens made beforehand, through its public `tokenizer` argument; `speedup` counts the faster of the two.
Every decision of the rival is compared with ours, and a further set of decisions on a smaller pool.

The pool is made up from the packaged seed prompts, the same one each time: pieces of them are joined to their lengths,
and a part of the words is replaced by words of a large vocabulary whose frequencies follow Zipf's law. `--prompts`
takes real ones. Half of the candidates are fresh ones; the other half are prompts of the pool with some three words in
ten changed, which puts them about the border.

    python -m benchmarks.rouge_filter --out benchmarks/results/rouge_filter.json
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

from etils import epath
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from benchmarks.figures import hand_over
from selfreward_jax.data.seeds import packaged, prompt_texts
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.self_instruct.filters import SIMILAR_ABOVE, RougeIndex

RIVAL_SECONDS = 60.0  # of the processor, for each of its two forms
REPEATS = 5  # passes of ours over the candidates; the median counts
SMALL_POOL = 200  # where many more decisions are compared
VOCABULARY = 20_000
REPLACED = 0.3  # share of words replaced, in the pool's prompts and in candidates near one


def make_prompts(seed_prompts: Sequence[str]) -> Iterator[str]:
    """Distinct prompts without end, the same ones each time, with the lengths of the seed prompts."""
    rng = random.Random(0)
    seeds = [text.split() for text in seed_prompts]
    words = [word for word, _ in Counter(itertools.chain.from_iterable(seeds)).most_common()]
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvw" for vowel in "aeiou"]
    words += ["".join(rng.choices(syllables, k=3)) for _ in range(VOCABULARY - len(words))]
    shares = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))  # Zipf and Mandelbrot
    made: set[str] = set()
    while True:
        prompt: list[str] = []
        length = len(rng.choice(seeds))
        while len(prompt) < length:
            piece, size = rng.choice(seeds), rng.randint(2, 6)
            start = rng.randrange(max(1, len(piece) - size + 1))
            prompt += piece[start : start + size]
        drawn = rng.choices(words, cum_weights=shares, k=length)
        text = " ".join(new if rng.random() < REPLACED else old for old, new in zip(prompt, drawn))
        if text not in made:
            made.add(text)
            yield text


def near(text: str, others: Sequence[str], rng: random.Random) -> str:
    """A prompt with three words in ten replaced, or about as many replaced, left out or put in."""
    words = text.split()
    exact = rng.random() < 0.5
    changes = max(0, round(REPLACED * len(words)) + (0 if exact else rng.randint(-2, 1)))
    for place in rng.sample(range(len(words)), min(changes, len(words))):
        new = rng.choice(rng.choice(others).split())
        words[place] = new if exact else rng.choice([new, "", f"{new} {words[place]}"])
    return " ".join(words)


def make_candidates(pool: Sequence[str], fresh: Sequence[str], count: int) -> list[str]:
    """Half fresh prompts, half near a prompt of the pool, shuffled."""
    rng = random.Random(1)
    half = min(count // 2, len(fresh))
    candidates = [*fresh[:half], *(near(rng.choice(pool), pool, rng) for _ in range(count - half))]
    rng.shuffle(candidates)
    return candidates


class Tokenized(Tokenizer):
    """rouge_score's own tokens, made once for each text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._tokens = {text: DefaultTokenizer(use_stemmer=False).tokenize(text) for text in texts}

    def tokenize(self, text: str) -> list[str]:
        return self._tokens[text]


def greatest(scorer: RougeScorer, candidate: str, pool: Sequence[str]) -> float:
    """The greatest F of a candidate with any prompt, as the original finds it."""
    return max(scorer.score(candidate, prompt)["rougeL"].fmeasure for prompt in pool)


def time_rival(
    name: str, scorer: RougeScorer, candidates: Sequence[str], pool: Sequence[str]
) -> tuple[float, list[float]]:
    """Microseconds a candidate, and the greatest F of those for which `RIVAL_SECONDS` sufficed."""
    found: list[float] = []
    start = time.process_time()
    with progress(name, len(candidates), "candidates") as advance:
        for candidate in candidates:
            found.append(greatest(scorer, candidate, pool))
            advance(1)
            if time.process_time() - start > RIVAL_SECONDS:
                break
    return (time.process_time() - start) / len(found) * 1e6, found


def time_ours(pool: Sequence[str], candidates: Sequence[str]) -> tuple[float, float, list[bool]]:
    """Microseconds to add a prompt, microseconds to decide on a candidate, and the decisions."""
    seconds, built = timed(lambda: RougeIndex(texts=pool))
    passes = [timed(lambda: [built.is_similar(text) for text in candidates]) for _ in range(REPEATS)]
    decide = statistics.median(taken for taken, _ in passes)
    return seconds / len(pool) * 1e6, decide / len(candidates) * 1e6, passes[0][1]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(pool: Sequence[str], fresh: Sequence[str], count: int) -> dict[str, Any]:
    """All figures, with `count` candidates for ours and as many for the rival as there is time for."""
    say(f"{'pool':>8} {'us a candidate':>15} {'us to add one':>14} {'similar':>8}")
    ours: dict[int, float] = {}
    candidates: list[str] = []
    decisions: list[bool] = []
    for size in sorted({max(1, len(pool) // part) for part in (10, 4, 2, 1)}):
        candidates = make_candidates(pool[:size], fresh, count)  # half are near a prompt of this very pool
        add, ours[size], decisions = time_ours(pool[:size], candidates)
        say(f"{size:>8} {ours[size]:>15.1f} {add:>14.1f} {sum(decisions) / len(decisions):>8.0%}")
    # The last size was the whole pool; its candidates and decisions are compared.
    original = RougeScorer(["rougeL"], use_stemmer=False)
    ahead = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=Tokenized([*pool, *candidates]))
    as_original, found = time_rival("rival as in the original", original, candidates, pool)
    tokenized, found_ahead = time_rival("rival with tokens made beforehand", ahead, candidates, pool)
    rival = max(found, found_ahead, key=len)
    wrong = sum((f > SIMILAR_ABOVE) != verdict for f, verdict in zip(rival, decisions))
    wrong += sum(a != b for a, b in zip(found, found_ahead))  # tokens made beforehand change no score
    small = pool[:SMALL_POOL]
    many = make_candidates(small, fresh, 2 * count)
    index = RougeIndex(texts=small)
    with progress(f"decisions on a pool of {len(small)}", len(many), "candidates") as advance:
        for candidate in many:
            rival.append(greatest(original, candidate, small))
            wrong += (rival[-1] > SIMILAR_ABOVE) != index.is_similar(candidate)
            advance(1)
    our = ours[len(pool)]
    return {
        "pool": len(pool),
        "candidates": len(candidates),
        "our_us_per_candidate": round(our, 1),
        "our_us_by_pool": {str(size): round(us, 1) for size, us in ours.items()},
        "growth": round(our / ours[min(ours)], 2),
        "rival": f"rouge_score {metadata.version('rouge_score')}, RougeScorer(['rougeL'], use_stemmer=False).score",
        "rival_us_per_candidate": round(min(as_original, tokenized)),
        "rival_us_as_original": round(as_original),
        "rival_us_tokens_beforehand": round(tokenized),
        "speedup": round(min(as_original, tokenized) / our),
        "speedup_over_original": round(as_original / our),
        "decisions_equal": wrong == 0,
        "compared": len(rival),
        "compared_at_full_pool": len(rival) - len(many),
        "compared_similar": sum(f > SIMILAR_ABOVE for f in rival),
        "compared_near_border": sum(abs(f - SIMILAR_ABOVE) < 0.05 for f in rival),
        "compared_at_border": sum(abs(f - SIMILAR_ABOVE) < 1e-12 for f in rival),
    }


def texts_of(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The pool and the fresh candidates.

    Raises:
        UserError: for a count below 1, and for a file with too few distinct prompts.
    """
    problems = [
        f"--{name}={value} must be at least {least}"
        for name, least in (("pool", 10), ("candidates", 2))
        if (value := getattr(arguments, name)) < least
    ]
    if problems:
        raise UserError(*problems)
    needed = arguments.pool + arguments.candidates // 2
    if arguments.prompts:
        texts = list(dict.fromkeys(text for _, text in prompt_texts(arguments.prompts, "")))[:needed]
        if len(texts) < needed:
            raise UserError(
                f"--prompts={arguments.prompts}: {len(texts)} distinct prompts, {needed} are needed;"
                " lower --pool or --candidates"
            )
    else:
        rows = [json.loads(line) for line in packaged("trees.jsonl").read_text().splitlines()]
        texts = list(itertools.islice(make_prompts([row["prompt"]["text"] for row in rows]), needed))
    return texts[: arguments.pool], texts[arguments.pool :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=10_000, help="prompts in the largest pool (default %(default)s)")
    parser.add_argument("--candidates", type=int, default=500, help="candidates for ours (default %(default)s)")
    parser.add_argument("--prompts", default="", help="a jsonl file of prompts instead of made-up ones")
    parser.add_argument("--out", default="", help="a file for the last line too")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        figures = measure(*texts_of(arguments), arguments.candidates)
        figures |= {
            "prompts": epath.Path(arguments.prompts).name if arguments.prompts else "made up from the packaged seeds",
            "python": platform.python_version(),
        }
        hand_over(figures, arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if figures["decisions_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
