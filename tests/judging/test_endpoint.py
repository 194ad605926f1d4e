"""The endpoint client against a real HTTP server on loopback that misbehaves on a script."""

import collections
import contextlib
import dataclasses
import email.utils
import http.client
import http.server
import itertools
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax.errors import UserError
from selfreward_jax.judging import endpoint as client
from selfreward_jax.judging import transport
from selfreward_jax.judging.endpoint import Answer, Endpoint, Usage, ask, backoff, open_endpoint

KEY = "sk-Zq7/4fX9+secret-Token_0123456789"
FEW = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64, "seed": 100}


@dataclasses.dataclass(frozen=True)
class Seen:
    command: str
    path: str
    headers: dict[str, str]
    body: dict


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        try:
            step = self.server.script.popleft()
        except IndexError:
            step = echo
        step(self, body)

    def do_CONNECT(self):
        self.server.seen.append(Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, {}))
        send(self, b"", status=403)

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Each request takes the next step of the script; after the last, the server echoes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Seen] = []
        self.script = collections.deque()
        self.release = threading.Event()  # what hangs, hangs until the end of the test
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        assert isinstance(sys.exception(), OSError)  # a client that has gone is no news


@contextlib.contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as running:
        yield running


def send(handler, body, status=200, reason=None, length=None, **headers):
    handler.send_response(status, reason)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(*texts, reason="stop"):
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for i, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 3 * len(texts)}}


def echo(handler, body):
    """As many answers as are asked for, each with the prompt and its seed: what the client must put in order."""
    prompt = body["messages"][0]["content"]
    texts = [f"{prompt} {body['seed'] + i}" for i in range(body["n"])]
    send(handler, json.dumps(completion(*texts)).encode())


def says(data, status=200, **headers):
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return lambda handler, _: send(handler, body, status, **headers)


def cut(handler, _):
    send(handler, b'{"choices": [', length=500)
    handler.close_connection = True


def cut_without_length(handler, _):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def cut_chunk(handler, _):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'100\r\n{"choices": [')
    handler.close_connection = True


def no_reply(handler, _):
    handler.close_connection = True


def not_http(handler, _):
    handler.wfile.write(b"SSH-2.0-nonsense\r\n")
    handler.close_connection = True


def reset(handler, _):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
    handler.close_connection = True


def hang(handler, _):
    handler.server.release.wait(60)
    handler.close_connection = True


def drip(body):
    """A byte now and then, each well within the timeout, for ever."""

    def step(handler, _):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 1000\r\n\r\n" if body else b"X-Slow: "))
        while not handler.server.release.wait(0.02):
            handler.wfile.write(b" ")

    return step


def endless(handler, _):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(34):
        handler.wfile.write(bytes(1 << 20))
    handler.close_connection = True


def at(server, **options):
    return Endpoint(
        **{"url": server.url, "model": "judge-1", "key": KEY, "timeout": 10.0, "concurrency": 1, **options}
    )


def run(endpoint, prompts=("p",), n=1, **options):
    """Asks with waits that take no time; they are recorded."""
    waits = []
    answers, usage = ask(endpoint, prompts, n, **FEW, sleep=waits.append, **options)
    return answers, usage, waits


def error_of(endpoint, **options):
    """The one line of the error; and no form of the exception shows the key."""
    with pytest.raises(UserError) as caught:
        run(endpoint, **options)
    error = caught.value
    (line,) = error.args
    assert "\n" not in line and line.startswith(f"endpoint {endpoint.url}: ")
    assert error.__cause__ is None and error.__context__ is None
    shown = "".join(traceback.format_exception(error)) + repr(error) + str(error)
    frame = error.__traceback__
    while frame:  # what a debugger or a report with locals shows, apart from this file's own
        if frame.tb_frame.f_code.co_filename in (client.__file__, transport.__file__):
            shown += repr(frame.tb_frame.f_locals)
        frame = frame.tb_next
    if endpoint.key:
        assert endpoint.key not in shown
    return line


# What is sent and what comes back


def test_a_request_has_what_was_asked_for(server):
    answers, usage, waits = run(at(server), ["hello \ud800 \u2028"], n=2)
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["content-type"] == "application/json" and seen.headers["connection"] == "close"
    assert seen.body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "hello \ud800 \u2028"}],
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 100,
    }
    # Half of a surrogate pair is no text that a UTF-8 file can hold.
    assert answers == [[Answer("hello \ufffd \u2028 100", "stop"), Answer("hello \ufffd \u2028 101", "stop")]]
    assert usage == Usage(requests=1, retries=0, prompt_tokens=10, completion_tokens=6)
    assert waits == []


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_the_path_is_appended_unless_it_is_there(server, path):
    run(at(server, url=f"http://127.0.0.1:{server.server_port}{path}", key=""))
    assert server.seen[0].path == "/v1/chat/completions"
    assert "authorization" not in server.seen[0].headers


def test_answers_keep_the_order_of_the_prompts(server):
    def slow_first(handler, body):
        time.sleep(0.05 * (4 - int(body["messages"][0]["content"]) % 4))
        echo(handler, body)

    server.script.extend([slow_first] * 12)
    finished = []
    answers, usage, _ = run(
        at(server, concurrency=4), [str(i) for i in range(12)], n=2, finished=lambda *args: finished.append(args)
    )
    assert answers == [
        [Answer(f"{i} {100 + 2 * i}", "stop"), Answer(f"{i} {101 + 2 * i}", "stop")] for i in range(12)
    ]
    assert usage == Usage(12, 0, 120, 72)
    assert sorted(finished, key=lambda done: done[0]) == [
        (i, answers[i], Usage(1, 0, 10, 6)) for i in range(12)
    ]  # fmt: skip
    assert [done[0] for done in finished] != list(range(12)), "the server must have answered out of order"


def test_no_more_requests_at_a_time_than_allowed(server):
    lock, now, most = threading.Lock(), [0], [0]

    def count(handler, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        echo(handler, body)

    server.script.extend([count] * 9)
    run(at(server, concurrency=3), [str(i) for i in range(9)])
    assert most[0] == 3


def test_no_prompts_no_requests(server):
    assert run(at(server), []) == ([], Usage(), [])
    assert server.seen == []


def test_a_server_that_ignores_n_is_asked_for_the_rest(server):
    server.script.extend([says(completion("a")), says(completion("b", "c"))])
    answers, usage, waits = run(at(server), ["x", "y"], n=4)
    assert [answer.text for answer in answers[0]] == ["a", "b", "c", "x 103"]
    assert [answer.text for answer in answers[1]] == ["y 104", "y 105", "y 106", "y 107"]
    assert [(seen.body["n"], seen.body["seed"]) for seen in server.seen] == [(4, 100), (3, 101), (1, 103), (4, 104)]
    assert usage == Usage(requests=4, retries=0, prompt_tokens=40, completion_tokens=3 + 6 + 3 + 12)
    assert waits == []


def test_more_choices_than_asked_for_are_dropped(server):
    server.script.append(says(completion("a", "b", "c")))
    assert [answer.text for answer in run(at(server), n=2)[0][0]] == ["a", "b"]


def test_choices_come_in_the_order_of_their_indices(server):
    data = completion("a", "b", "c")
    data["choices"] = [data["choices"][i] for i in (2, 0, 1)]
    server.script.append(says(data))
    assert [answer.text for answer in run(at(server), n=3)[0][0]] == ["a", "b", "c"]


@pytest.mark.parametrize("index", [0, None, "1", 1.5])
def test_choices_without_indices_that_order_them_stay_as_they_are(server, index):
    data = completion("c", "a", "b")
    for choice in data["choices"]:
        choice["index"] = index
    server.script.append(says(data))
    assert [answer.text for answer in run(at(server), n=3)[0][0]] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("content", "reason", "answer"),
    [
        ("Score: 3", "stop", Answer("Score: 3", "stop")),
        ("Score", "length", Answer("Score", "length")),
        (None, "content_filter", Answer("", "content_filter")),
        (None, "stop", Answer("", "stop")),
        ("", "length", Answer("", "length")),
        ("Score: 3", None, Answer("Score: 3", "unknown")),
        ("Score: 3", 7, Answer("Score: 3", "unknown")),
        ("Score: 3", "end\n\x1b[31mturn", Answer("Score: 3", "end [31mturn")),
        ("two\n lines\t", "stop", Answer("two\n lines\t", "stop")),
        (f"I was sent {KEY}!", "stop", Answer("I was sent [key]!", "stop")),
    ],
)
def test_text_and_finish_reason(server, content, reason, answer):
    server.script.append(says(completion(content, reason=reason)))
    assert run(at(server))[0] == [[answer]]


def test_a_short_key_is_no_secret_and_may_be_a_word_of_an_answer(server):
    server.script.append(says(completion("an EMPTY answer")))
    assert run(at(server, key="EMPTY"))[0] == [[Answer("an EMPTY answer", "stop")]]


@pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": "12"}, {"prompt_tokens": -3}])
def test_usage_that_is_not_there_counts_nothing(server, usage):
    server.script.append(says({**completion("a"), "usage": usage}))
    assert run(at(server))[1] == Usage(requests=1)


def test_seeds_stay_in_31_bits(server):
    ask(at(server), ["a", "b"], 1, 1.0, 1.0, 8, seed=2**31 - 1)
    assert [seen.body["seed"] for seen in server.seen] == [2**31 - 1, 0]


# What passes is tried again


PASSING = {
    **{f"status {status}": says(b"", status) for status in (408, 409, 429, 500, 502, 503, 504, 520, 524, 529)},
    "html error page": says(b"<html><h1>Bad gateway</h1></html>", 502),
    "html with status 200": says(b"<html>please log in</html>"),
    "broken json": says(b'{"choices": ]'),
    "json cut early": says(json.dumps(completion("a")).encode()[:-9]),
    "not utf-8": says(b'{"choices": "\xff"}'),
    "deep json": says(b"[" * 100_000),
    "huge number": says(b'{"choices": ' + b"9" * 10_000 + b"}"),
    "no choices": says({"id": 1}),
    "empty choices": says({"choices": []}),
    "choices no list": says({"choices": {"0": 1}}),
    "choice no object": says({"choices": ["text"]}),
    "choice without message": says({"choices": [{"text": "old style"}]}),
    "content no text": says(completion([{"type": "text"}])),
    "a list": says([1, 2]),
    "an error with status 200": says({"error": {"message": "overloaded", "code": 502}}),
    "empty body": says(b""),
    "no content": says(b"", 204),
    "cut body": cut,
    "cut body without length": cut_without_length,
    "cut chunk": cut_chunk,
    "no reply": no_reply,
    "not http": not_http,
    "reset": reset,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(server, name):
    server.script.extend([PASSING[name], PASSING[name]])
    answers, usage, waits = run(at(server, retries=2))
    assert answers == [[Answer("p 100", "stop")]], "and with the same seed"
    assert usage == Usage(requests=3, retries=2, prompt_tokens=10, completion_tokens=3)
    assert len(waits) == 2 and 0 <= waits[0] <= 1 and 0 <= waits[1] <= 2


@pytest.mark.parametrize("name", PASSING)
def test_after_the_last_retry_one_line_says_so(server, name):
    server.script.extend([PASSING[name]] * 5)
    line = error_of(at(server, retries=2))
    assert "tried 3 times, at last: " in line and line.endswith(
        "; finished work is kept, start the same command again to go on"
    )
    assert len(server.seen) == 3


def test_a_cut_answer_says_where(server):
    server.script.append(cut)
    assert "at last: the answer was cut after 13 of 500 bytes;" in error_of(at(server, retries=0))


@pytest.mark.parametrize("step", [hang, drip(body=True), drip(body=False)], ids=["hangs", "body drips", "head drips"])
def test_an_answer_that_takes_too_long_is_given_up(server, step):
    server.script.extend([step] * 2)
    start = time.monotonic()
    line = error_of(at(server, timeout=0.2, retries=1))
    assert "tried 2 times, at last: no whole answer in 0.2 s;" in line
    assert 0.4 <= time.monotonic() - start < 30
    server.script.append(step)
    assert run(at(server, timeout=0.5, retries=20))[1].retries >= 1  # more on a busy machine


def test_a_refused_connection_is_tried_again(server):
    with socket.socket() as taken:  # bound, not listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        line = error_of(at(server, url=f"http://127.0.0.1:{taken.getsockname()[1]}", retries=3))
    assert "tried 4 times, at last: Connection refused" in line


def test_no_retries_says_once(server):
    server.script.append(says(b"", 503))
    assert "tried once, at last: 503 Service Unavailable;" in error_of(at(server, retries=0))


def test_every_request_has_its_own_retries(server):
    busy = says(b"", 503)
    server.script.extend([busy, busy, says(completion("a")), busy, busy, says(completion("b"))])
    answers, usage, waits = run(at(server, retries=2), n=2)
    assert [answer.text for answer in answers[0]] == ["a", "b"]
    assert (usage.requests, usage.retries, len(waits)) == (6, 4, 4)


def test_the_server_says_how_long_to_wait(server):
    past = email.utils.format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True)
    future = email.utils.format_datetime(datetime(2999, 1, 1, tzinfo=UTC), usegmt=True)
    asked = [("7", 7), ("1.5", 1.5), ("999999", 120), (past, 0), (future, 120), ("soon", 0)]
    server.script.extend(says({"error": {"message": "slow down"}}, 429, Retry_After=value) for value, _ in asked)
    _, usage, waits = run(at(server))
    assert usage.retries == len(asked)
    for retry, (wait, (_, seconds)) in enumerate(zip(waits, asked, strict=True)):
        assert seconds <= wait <= seconds + min(60, 2**retry), "and its own part on top, so that clients spread out"


def test_the_waits_follow_the_seed_and_the_prompt_alone(server):
    def waits_of(seed, prompts, concurrency):
        waits = []
        server.script.extend([says(b"", 500)] * (2 * len(prompts)))
        ask(at(server, concurrency=concurrency), prompts, 1, 1.0, 1.0, 8, seed, sleep=waits.append)
        return waits

    first = waits_of(5, ["a"], 1)
    assert len(set(first)) == 2
    assert waits_of(5, ["b"], 1) == first
    assert waits_of(6, ["a"], 1) != first


@given(retry=st.integers(0, 10_000), seed=st.integers())
def test_backoff_grows_to_a_minute(retry, seed):
    assert 0 <= backoff(retry, random.Random(seed)) <= min(60, 2 ** min(retry, 6))


def test_backoff_is_spread_over_its_range():
    draws = [backoff(3, random.Random(seed)) for seed in range(500)]
    assert min(draws) < 0.5 and max(draws) > 7.5 and 3.5 < sum(draws) / 500 < 4.5


# What cannot pass is one line


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422, 501])
@pytest.mark.parametrize("n", [1, 3])
def test_a_refusal_is_not_tried_again(server, status, n):
    server.script.append(says({"error": {"message": "no\r\nsuch \x1b[31mthing\u202e"}}, status))
    line = error_of(at(server), n=n)
    assert f": {status} " in line and ": no such [31mthing" in line
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "options", "says_"),
    [
        (401, {}, "check the key in $OPENAI_API_KEY"),
        (401, {"key": "", "key_variable": "MY_KEY"}, "set a key in $MY_KEY"),
        (404, {}, "check the URL (most end in /v1) and the model's name 'judge-1'"),
    ],
)
def test_a_refusal_teaches(server, status, options, says_):
    server.script.append(says({}, status))
    assert error_of(at(server, **options)).endswith(f"; {says_}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "bad"}}, "bad"),
        ({"error": "bad"}, "bad"),
        ({"message": "bad"}, "bad"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too many"}]}, '[{"loc": ["body", "n"], "msg": "too many"}]'),
        (b"<html><title>400</title>\n<p>a &amp; b", "400 a & b"),
        (b"plain \xff text", "plain \ufffd text"),
        ({"error": {"message": "x" * 500}}, "x" * 197 + "..."),
        (b"y" * 1_000_000, "y" * 197 + "..."),
        ({}, "{}"),
    ],
)  # fmt: skip
def test_the_servers_own_message_is_shown(server, body, message):
    server.script.append(says(body, 400))
    assert error_of(at(server)) == f"endpoint {server.url}: 400 Bad Request: {message}"


def leaks():
    """A server that says the key back, in many ways; the name is what it does."""
    escaped = KEY.replace("/", "\\/")
    yield "in the message", says({"error": {"message": f"Incorrect API key provided: {KEY}."}}, 401)
    yield "in a field", says({"headers": {"authorization": f"Bearer {KEY}"}}, 400)
    yield "escaped", says(b'{"headers": "' + escaped.encode() + b'"}', 400)
    yield "as a page", says(f"<p>{KEY}</p>".encode(), 403)
    yield "as entities", says(f"<p>{KEY.replace('/', '&#x2F;').replace('+', '&#43;')}</p>".encode(), 403)
    yield "cut by tags and control characters", says(f"<b>{KEY[:9]}</b>{KEY[9:]}\x00".encode(), 403)
    yield "at the end of what is shown", says({"error": f"{'x' * 180} {KEY}"}, 400)
    yield "in the reason", lambda handler, _: send(handler, b"", 400, f"Bad {KEY}")
    yield "with status 200", says({"error": {"message": f"not with {KEY}"}})
    yield "with a status that passes", says(f"busy {KEY}".encode(), 503)
    yield "as a redirect", says(b"", 302, Location=f"/login?key={KEY}")
    yield "as a bad status line", lambda handler, _: (handler.wfile.write(KEY.encode()), no_reply(handler, _))
    yield "as a long header", lambda handler, _: handler.wfile.write(b"HTTP/1.1 200 " + KEY.encode() * 9000)


@pytest.mark.parametrize(("name", "step"), list(leaks()), ids=[name for name, _ in leaks()])
def test_a_key_that_the_server_says_back_is_not_shown(server, name, step, capfd, caplog):
    server.script.extend([step] * 2)
    line = error_of(at(server, retries=1))
    assert KEY[:9] not in line and KEY[-9:] not in line
    assert KEY not in "".join(capfd.readouterr()) + caplog.text


def test_debugging_of_all_connections_does_not_print_the_key(server, monkeypatch, capfd):
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    run(at(server))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server, status):
    with serving() as other:
        server.script.append(says(b"", status, Location=f"{other.url}/chat/completions"))
        line = error_of(at(server))
        assert f"redirects to {other.url}/chat/completions; not followed" in line
        assert other.seen == [] and len(server.seen) == 1


def test_an_answer_has_a_bound(server):
    server.script.append(endless)
    assert "more than 32 MiB" in error_of(at(server))
    server.script.append(lambda handler, _: (send(handler, bytes(33 << 20), length=1 << 40), no_reply(handler, _)))
    assert "more than 32 MiB" in error_of(at(server))
    assert len(server.seen) == 2


def test_the_first_error_ends_the_rest(server):
    server.script.extend([echo, says({"error": "unknown model"}, 404)])
    finished = []
    error_of(at(server), prompts=[str(i) for i in range(50)], finished=lambda *args: finished.append(args))
    assert gone()
    assert [(index, answers) for index, answers, _ in finished] == [(0, [Answer("0 100", "stop")])]
    assert len(server.seen) == 2


def test_an_error_in_the_callers_own_function_is_the_callers(server):
    def fails(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(at(server), finished=fails)


def test_a_mistake_inside_a_thread_comes_out(server, monkeypatch):
    monkeypatch.setattr(transport, "exchange", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(at(server, concurrency=3), ["a"] * 9)


# What a server wants put another way


def refuses(status, message):
    """A refusal in the form of OpenAI's, or as FastAPI's list of faults."""
    return says({"detail": message} if isinstance(message, list) else {"error": {"message": message}}, status)


def one_at_a_time(status, message):
    """A server that refuses n > 1, however often it is asked."""

    def step(handler, body):
        (echo if body["n"] == 1 else refuses(status, message))(handler, body)

    return step


def new_limit(handler, body):
    """A server that takes max_completion_tokens alone."""
    if "max_tokens" in body:
        refuses(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")(handler, body)
    else:
        echo(handler, body)


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "message",
    [
        "n must be 1", "'n' : number must be at most 1", 'parameter "n" is not supported', "`n` > 1 is not possible",
        "Only n=1 can be served", "Invalid value for n.", "multiple choices (n) are not offered",
        f"{'x' * 500}: only one choice, not so many as n says", [{"loc": ["body", "n"], "msg": "at most 1"}],
    ],
)  # fmt: skip
def test_a_server_that_refuses_n_is_asked_one_by_one(server, status, message):
    server.script.extend([one_at_a_time(status, message)] * 7)
    answers, usage, waits = run(at(server, retries=0), ["x", "y"], n=3)
    assert [[answer.text for answer in each] for each in answers] == [
        ["x 100", "x 101", "x 102"], ["y 103", "y 104", "y 105"]
    ]  # fmt: skip
    assert [(seen.body["n"], seen.body["seed"]) for seen in server.seen] == [
        (3, 100), (1, 100), (1, 101), (1, 102), (1, 103), (1, 104), (1, 105)
    ]  # fmt: skip
    assert usage == Usage(requests=7, retries=1, prompt_tokens=60, completion_tokens=18)
    assert waits == []


def test_the_next_call_asks_for_n_again(server):
    server.script.extend([one_at_a_time(400, "n must be 1")] * 3)
    endpoint = at(server)
    run(endpoint, n=2)
    run(endpoint, n=2)
    assert [seen.body["n"] for seen in server.seen] == [2, 1, 1, 2]


def test_requests_under_way_are_all_put_another_way(server):
    together = threading.Barrier(4)

    def refused(handler, body):
        assert body["n"] == 3
        together.wait(30)  # so that every thread has its own refusal
        refuses(422, "n must be 1")(handler, body)

    server.script.extend([refused] * 4)
    answers, usage, _ = run(at(server, concurrency=4), list("abcdef"), n=3)
    assert [[answer.text for answer in each] for each in answers] == [
        [f"{prompt} {100 + 3 * i + j}" for j in range(3)] for i, prompt in enumerate("abcdef")
    ]
    assert usage == Usage(requests=4 + 18, retries=4, prompt_tokens=180, completion_tokens=54)


def test_a_server_that_wants_max_completion_tokens_gets_it(server):
    server.script.extend([new_limit] * 3)
    answers, usage, waits = run(at(server, retries=0), ["x", "y"], n=2)
    assert [answer.text for answer in answers[1]] == ["y 102", "y 103"]
    first, *others = (seen.body for seen in server.seen)
    assert first["max_tokens"] == 64 and "max_completion_tokens" not in first
    assert [body["max_completion_tokens"] for body in others] == [64, 64]
    assert not any("max_tokens" in body for body in others)
    assert usage == Usage(requests=3, retries=1, prompt_tokens=20, completion_tokens=12)
    assert waits == []


@pytest.mark.parametrize("first", ["limit", "n"])
def test_a_server_may_want_both(server, first):
    only_one = one_at_a_time(400, "n must be 1")

    def step(handler, body):
        wants_limit, wants_one = "max_tokens" in body, body["n"] > 1
        (new_limit if wants_limit and (first == "limit" or not wants_one) else only_one)(handler, body)

    server.script.extend([step] * 4)
    answers, usage, _ = run(at(server, retries=0), n=2)
    assert [answer.text for answer in answers[0]] == ["p 100", "p 101"]
    assert usage == Usage(requests=4, retries=2, prompt_tokens=20, completion_tokens=6)


def test_a_request_put_another_way_is_tried_again_as_any(server):
    busy = says(b"", 503)
    server.script.extend([busy, refuses(400, "n must be 1"), busy, echo, echo])
    answers, usage, waits = run(at(server, retries=1), n=2)
    assert [answer.text for answer in answers[0]] == ["p 100", "p 101"]
    assert (usage.requests, usage.retries, len(waits)) == (5, 3, 2)


@pytest.mark.parametrize(
    ("status", "message", "n", "requests"),
    [
        (400, "n must be 1", 1, 1),  # it was
        (400, "n must be 1", 2, 2),  # and it refuses 1, too
        (403, "n must be 1", 2, 1),
        (400, "use max_completion_tokens", 1, 2),
        (422, "use max_completion_tokens", 1, 1),
        (400, "max_tokens is too large", 2, 1),
        (400, "not a number\\n at line 1\nnone, n/a, an n-gram, N", 3, 1),
        (422, [{"loc": ["body", "temperature"], "msg": "at most 1"}], 3, 1),
    ],
)
def test_any_other_refusal_is_one_line(server, status, message, n, requests):
    server.script.extend([refuses(status, message)] * 5)
    assert f": {status} " in error_of(at(server), n=n)
    assert len(server.seen) == requests


def test_a_key_in_a_message_that_names_n_is_not_shown(server):
    server.script.extend([refuses(400, f"n must be 1, {KEY}")] * 2)
    assert error_of(at(server), n=2).endswith(": n must be 1, [key]")


# How many a minute


def test_requests_a_minute_are_spaced(server):
    now = [1000.0]
    sent = []

    def note(handler, body):
        sent.append(now[0])
        echo(handler, body)

    def sleep(seconds):
        now[0] += seconds

    server.script.extend([note, note, says(b"", 503), note, note, note])
    endpoint = at(server, per_minute=20)
    options = {**FEW, "sleep": sleep, "clock": lambda: now[0]}
    ask(endpoint, ["a", "b", "c", "d"], 1, **options)
    ask(endpoint, ["e"], 1, **options)  # the next call is no way around it
    assert len(sent) == 5
    gaps = [b - a for a, b in itertools.pairwise(sent)]
    assert gaps == pytest.approx([3, 6, 3, 3], abs=1e-6), "the failed one takes its place, too"


def test_threads_share_the_pace(server):
    waits = []
    ask(at(server, per_minute=60, concurrency=4), list("abcdefgh"), 1, **FEW, sleep=waits.append, clock=lambda: 0.0)
    assert sorted(waits) == [1, 2, 3, 4, 5, 6, 7]


def test_time_that_passed_is_not_waited_again(server):
    now = [0.0]
    waits = []
    endpoint = at(server, per_minute=6)
    for _ in range(3):
        ask(endpoint, ["a"], 1, **FEW, sleep=waits.append, clock=lambda: now[0])
        now[0] += 60
    assert waits == []


# An end at any time


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("endpoint-")]


def gone(seconds=30.0):
    end = time.monotonic() + seconds
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not threads()


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal's process has it: one that a shell started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_requests_and_waits(server, interruptible):
    server.script.extend([hang, hang, says(b"", 503, Retry_After="100"), hang])

    def interrupt():
        while len(server.seen) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(at(server, concurrency=4, timeout=100.0), list("abcdefgh"), 1, **FEW)
    assert gone() and time.monotonic() - start < 30
    assert len(server.seen) == 4, "nothing is sent afterwards"


def test_an_error_ends_the_requests_of_the_other_threads(server):
    server.script.extend([hang, hang, says(b"", 401)])
    error_of(at(server, concurrency=3, timeout=100.0), prompts=list("abcdefgh"))
    assert gone() and len(server.seen) == 3


def interrupted(url, busy):
    """What a process shows whose requests hang and that is then interrupted; it has less time than they to end."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from selfreward_jax.judging.endpoint import *;"
        "ask(Endpoint(sys.argv[1], 'm', '', timeout=100.0, concurrency=2), list('abcd'), 1, 1.0, 1.0, 8, 0)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE, text=True)
    try:
        busy()
        child.send_signal(signal.SIGINT)
        return child.communicate(timeout=30)[1]
    finally:
        child.kill()
        child.communicate()


def test_a_process_that_is_interrupted_ends_at_once(server):
    server.script.extend([hang] * 2)

    def busy():
        end = time.monotonic() + 60
        while len(server.seen) < 2 and time.monotonic() < end:
            time.sleep(0.01)

    assert interrupted(server.url, busy).rstrip().endswith("KeyboardInterrupt")
    assert len(server.seen) == 2


def test_a_process_that_is_interrupted_while_it_connects_ends_at_once():
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as wires:

        def busy():
            silent.settimeout(60)
            for _ in range(2):
                wire = wires.enter_context(silent.accept()[0])
                wire.settimeout(60)
                assert wire.recv(1), "the handshake has begun, and nothing answers it"

        shown = interrupted(f"https://127.0.0.1:{silent.getsockname()[1]}", busy)
    assert shown.rstrip().endswith("KeyboardInterrupt")


# Where the key may go


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("A_KEY", f" {KEY}\n")
    endpoint = open_endpoint("https://host.example/v1", "m", "A_KEY", 5.0, 1, 2, 3)
    assert endpoint.key == KEY and KEY not in repr(endpoint) and KEY not in str(endpoint)
    assert (endpoint.timeout, endpoint.retries, endpoint.concurrency, endpoint.per_minute) == (5.0, 1, 2, 3)
    with pytest.raises(TypeError):
        dataclasses.asdict(endpoint)  # so that it cannot be written with a config by mistake
    monkeypatch.delenv("A_KEY")
    assert open_endpoint("https://host.example/v1", "m", "A_KEY").key == ""


def test_all_problems_are_said_at_once():
    with pytest.raises(UserError) as caught:
        Endpoint("nowhere", "", "a\nb", timeout=float("nan"), retries=-1, concurrency=0, per_minute=-1)
    assert len(caught.value.args) == 7
    assert "a\nb" not in str(caught.value)


def test_proxies_of_the_environment(server, monkeypatch):
    with serving() as proxy:
        address = f"127.0.0.1:{proxy.server_port}"
        monkeypatch.setenv("http_proxy", f"http://me:se%20cret@{address}")
        monkeypatch.setenv("https_proxy", address)
        monkeypatch.setenv("no_proxy", "direct.invalid")
        # This machine is never asked by way of a proxy, and plain http with a key never goes through one.
        run(at(server))
        assert proxy.seen == [] and len(server.seen) == 1
        error_of(at(server, url="http://judge.internal:1/v1", retries=0))
        error_of(at(server, url="http://direct.invalid/v1", key="", retries=0))
        assert proxy.seen == []

        answers, _, _ = run(at(server, url="http://public.invalid:81/v1", key=""))
        assert answers == [[Answer("p 100", "stop")]]
        (seen,) = proxy.seen
        assert seen.path == "http://public.invalid:81/v1/chat/completions"
        assert seen.headers["host"] == "public.invalid:81"
        assert seen.headers["proxy-authorization"] == "Basic bWU6c2UgY3JldA=="  # me:se cret

        # https goes through a tunnel, whose opening has neither the key nor the request.
        line = error_of(at(server, url="https://public.invalid/v1", retries=0))
        assert "Tunnel connection failed: 403" in line
        tunnel = proxy.seen[1]
        assert (tunnel.command, tunnel.path) == ("CONNECT", "public.invalid:443")
        assert "authorization" not in tunnel.headers and KEY not in str(tunnel)


def test_a_server_without_tls_sees_no_request(server):
    url = f"https://127.0.0.1:{server.server_port}/v1"
    assert "tried 2 times" in error_of(at(server, url=url, retries=1))
    assert server.seen == []
