"""A chat-completions endpoint as a fixed judge: the baseline whose reward does not change (paper 2.2 has it change).

Speaks the OpenAI wire format, which most servers of models offer, with the standard library alone. A hosted judge
costs money and fails now and then: what can pass is tried again, what the server wants put another way is put so, and
all else is one line. How the bytes move, and who may see the key: transport.py.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from selfreward_jax.errors import UserError
from selfreward_jax.judging import transport
from selfreward_jax.judging.transport import Failure, clean, retry_after

__all__ = ["Answer", "Endpoint", "Pace", "Usage", "ask", "backoff", "open_endpoint", "retry_after"]

BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0  # seconds
_PATH = "/chat/completions"
# A short key ("EMPTY", for servers that want any) is no secret, and may be a word of an answer.
_SECRET_CHARACTERS = 16
_NEW_LIMIT = "max_completion_tokens"  # what some servers want in place of max_tokens
# The parameter n as a server's message names it: 'n', "n must be 1", n=1; not the n of \n, n/a or n-gram.
_N = re.compile(r"(?<![\w\\])n(?![\w/-])")


class Pace:
    """When the next request may start, evenly spaced; one for all threads and calls that use an endpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = float("-inf")

    def turn(self, per_minute: int, clock: Callable[[], float]) -> float:
        """Takes the next place; how many seconds from now it is."""
        if not per_minute:
            return 0.0
        with self._lock:
            now = clock()
            start = max(now, self._next)
            self._next = start + 60 / per_minute
            return start - now


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. Making one raises UserError for what cannot work or would show the key to others.

    Attributes:
        url: base URL such as https://host/v1; "/chat/completions" is appended unless it is there.
        model: the server's name of the model.
        key: sent as a bearer token; "" for none. Never shown.
        timeout: seconds to connect, and again for the whole answer.
        retries: further tries of a request that failed.
        concurrency: requests at a time.
        per_minute: most requests a minute, tries included; 0: no limit.
        key_variable: the environment variable that holds the key, for messages.
    """

    url: str
    model: str
    key: str = dataclasses.field(repr=False)
    timeout: float = 120.0
    retries: int = 6
    concurrency: int = 8
    per_minute: int = 0
    key_variable: str = "OPENAI_API_KEY"
    pace: Pace = dataclasses.field(default_factory=Pace, repr=False, compare=False)

    def __post_init__(self) -> None:
        if problems := [*_problems(self), *transport.problems(self.url, self.key, self.key_variable)]:
            raise UserError(*problems)


def _problems(endpoint: Endpoint) -> Iterator[str]:
    if not endpoint.model or not endpoint.model.isprintable():
        yield "endpoint: needs the name of a model, as its server calls it"
    for name, least in (("retries", 0), ("concurrency", 1), ("per_minute", 0)):
        if getattr(endpoint, name) < least:
            yield f"endpoint: {name} is {getattr(endpoint, name)}, must be at least {least}"
    if not 0 < endpoint.timeout <= 86400:
        yield f"endpoint: timeout is {endpoint.timeout} s, must be more than 0 and at most a day"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One choice. `finish_reason` is "stop", "length" (cut at max_tokens), or what else the server says.

    Others, such as "content_filter", often come with an empty text. They are kept as they are, not made one of the
    two, so that the caller can count them; "unknown" if the server gives none. `text` is valid Unicode.
    """

    text: str
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """What was spent: requests sent (retries are among them) and the tokens that the server counted, if it did."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))


def open_endpoint(
    url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 120.0, retries: int = 6,
    concurrency: int = 8, per_minute: int = 0,
) -> Endpoint:  # fmt: skip
    """An endpoint with the key of the environment variable, or without a key if that is unset; sends nothing.

    Raises:
        UserError: see `Endpoint`; all problems at once.
    """
    key = os.environ.get(key_variable, "").strip()
    return Endpoint(url, model, key, timeout, retries, concurrency, per_minute, key_variable)


def ask(
    endpoint: Endpoint, prompts: Sequence[str], n: int, temperature: float, top_p: float, max_tokens: int, seed: int,
    *, finished: Callable[[int, list[Answer], Usage], None] | None = None,
    sleep: Callable[[float], object] | None = None, clock: Callable[[], float] = time.monotonic,
) -> tuple[list[list[Answer]], Usage]:  # fmt: skip
    """Samples n answers to each prompt, every prompt a user's message of its own.

    A server that gives fewer choices than asked for is asked again for the rest. One that refuses n > 1 is asked
    for one at a time from then on, and one that wants max_completion_tokens gets that; a refused request counts in
    the usage. Answer j of prompt i is asked for with the seed `seed + i * n + j` modulo 2**31, the first of a
    request's answers standing for all; few servers honour it. The same seed also draws the waits between tries.

    Args:
        finished: called in this thread with each prompt's index, answers and usage, as they come.
        sleep: waits that many seconds; by default one that ends with this call.
        clock: seconds of a clock that only goes forward, for the requests per minute.

    Returns:
        n answers for each prompt in the order of the prompts, and what they cost in all.

    Raises:
        UserError: one line, if the server refuses a request or all tries of one failed. Requests under way are cut
            then, as they are on an interrupt; answers that `finished` was not given are lost.
    """
    wires = transport.Wires(endpoint.url)
    sampling = {"model": endpoint.model, "temperature": temperature, "top_p": top_p}
    call = _Call(endpoint, sampling, max_tokens, n, seed, wires, sleep or wires.ended.wait, clock, n)
    todo = collections.deque(enumerate(prompts))
    results: queue.SimpleQueue[tuple[int, list[Answer] | Failure | Exception, Usage]] = queue.SimpleQueue()

    def work() -> None:
        while not wires.ended.is_set():
            try:
                index, prompt = todo.popleft()
            except IndexError:
                return
            try:
                outcome, usage = _answers(call, index, prompt)
            except Exception as error:  # raised again in the caller's thread
                outcome, usage = error, Usage()
            results.put((index, outcome, usage))
            if not isinstance(outcome, list):
                return

    answers: list[list[Answer]] = [[] for _ in prompts]
    total = Usage()
    try:
        # Daemons, not a pool: a pool's threads are waited for when Python ends, for as long as a request may take.
        for number in range(min(endpoint.concurrency, len(prompts))):
            threading.Thread(target=work, name=f"endpoint-{number}", daemon=True).start()
        for _ in prompts:
            index, outcome, usage = results.get()
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, Failure):
                raise UserError(f"endpoint {endpoint.url}: {outcome.line}{_hint(endpoint, outcome.status)}")
            answers[index], total = outcome, total + usage
            if finished:
                finished(index, outcome, usage)
    finally:
        wires.end()
    return answers, total


@dataclasses.dataclass
class _Call:
    """What all requests of one `ask` share; the last two are how they are put: answers in one, name of their limit.

    A refusal changes each at most once, to the same value from any thread, so there is no lock.
    """

    endpoint: Endpoint
    sampling: dict[str, Any]
    max_tokens: int
    n: int
    seed: int
    wires: transport.Wires
    sleep: Callable[[float], object]
    clock: Callable[[], float]
    most: int
    limit: str = "max_tokens"


def _answers(call: _Call, index: int, prompt: str) -> tuple[list[Answer] | Failure, Usage]:
    """The n answers to one prompt. Every reply has at least one, so there are at most n requests that succeed."""
    draw = random.Random(f"{call.seed}/{index}")  # of its own, so that the threads' order does not matter
    answers: list[Answer] = []
    total = Usage()
    while len(answers) < call.n:
        most, limit = min(call.n - len(answers), call.most), call.limit
        seed = (call.seed + index * call.n + len(answers)) % 2**31
        body = {**call.sampling, "messages": [{"role": "user", "content": prompt}], "n": most, "seed": seed}
        outcome, used = _tried(call, json.dumps({**body, limit: call.max_tokens}).encode(), most, draw)
        total += used
        # By what this request had, not by what the next will have: another thread may have changed it meanwhile.
        if isinstance(outcome, list):
            answers += outcome
        elif limit != _NEW_LIMIT and outcome.status == 400 and _NEW_LIMIT in outcome.said:
            call.limit, total = _NEW_LIMIT, total + Usage(retries=1)  # the next request
        elif most > 1 and outcome.status in (400, 422) and _N.search(outcome.said):
            call.most, total = 1, total + Usage(retries=1)
        else:
            return outcome, total
    return answers, total


def _tried(call: _Call, data: bytes, most: int, draw: random.Random) -> tuple[list[Answer] | Failure, Usage]:
    """One request with its further tries, and what they cost."""
    endpoint, key, tries = call.endpoint, call.endpoint.key, 0
    while True:
        if wait := endpoint.pace.turn(endpoint.per_minute, call.clock):
            call.sleep(wait)
        if call.wires.ended.is_set():
            return Failure("ended", False), Usage()
        got = transport.exchange(call.wires, _target(endpoint.url), key, endpoint.timeout, data)
        tries += 1
        outcome, tokens = (got, Usage()) if isinstance(got, Failure) else _reply(got, most, key)
        if isinstance(outcome, list) or not outcome.passing:
            return outcome, tokens + Usage(tries, tries - 1)
        if tries > endpoint.retries:
            often = "once" if tries == 1 else f"{tries} times"
            kept = "finished work is kept, start the same command again to go on"
            return Failure(f"tried {often}, at last: {outcome.line}; {kept}", False), Usage(tries, tries - 1)
        call.sleep(outcome.after + backoff(tries - 1, draw))


def _target(url: str) -> str:
    url = url.rstrip("/")
    return url if urllib.parse.urlsplit(url).path.endswith(_PATH) else url + _PATH


def backoff(retry: int, draw: random.Random) -> float:
    """Seconds before a retry (0: the first): uniform up to 1, 2, 4, ... at most 60, so that clients spread out."""
    return draw.uniform(0, min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(retry, 16)))


def _hint(endpoint: Endpoint, status: int) -> str:
    if status in (401, 403):
        return f"; {'check the' if endpoint.key else 'set a'} key in ${endpoint.key_variable}"
    if status == 404:
        return f"; check the URL (most end in /v1) and the model's name '{endpoint.model}'"
    return ""


def _reply(body: bytes, most: int, key: str) -> tuple[list[Answer] | Failure, Usage]:
    """The choices of a chat completion in the order of their indices and their tokens, or what is wrong with it."""
    wrong = "the answer is no chat completion"
    data = transport.parsed(body)
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(choices, list) or not choices:
        return Failure(f"{wrong}: {clean(transport.said(body), key) or 'it is empty'}", True), Usage()
    found: list[tuple[int, Answer]] = []
    for place, choice in enumerate(choices):
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else 0
        if content is not None and not isinstance(content, str):
            return Failure(f"{wrong}: choice {place} has no message with a text", True), Usage()
        text = re.sub("[\ud800-\udfff]", "\ufffd", content or "")
        if len(key) >= _SECRET_CHARACTERS:
            text = text.replace(key, "[key]")
        reason, index = choice.get("finish_reason"), choice.get("index")
        answer = Answer(text, clean(reason, key) if isinstance(reason, str) and reason else "unknown")
        found.append((index if isinstance(index, int) else place, answer))
    usage = data.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    tokens = Usage(0, 0, *(max(count, 0) if isinstance(count, int) else 0 for count in counts))
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])][:most], tokens
