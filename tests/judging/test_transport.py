"""Where a key may be sent and how: URLs, proxies, TLS, what a server's words show, how long it asks to wait.

The exchange itself is tested with the endpoint's client, against a server that misbehaves.
"""

import email.utils
import http.client
import re
import ssl
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward_jax.errors import UserError
from selfreward_jax.judging import transport
from selfreward_jax.judging.endpoint import Endpoint, retry_after

KEY = "sk-Zq7/4fX9+secret-Token_0123456789"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# How long to wait


@given(st.one_of(st.text(), st.from_regex(r"\w{0,4},? ?[0-9]+ \w+ [0-9]+ [0-9]+:[0-9]+(:[0-9]+)? ?[-+\w]*")))
def test_any_retry_after_is_bounded(value):
    assert 0 <= retry_after(value, 1e9) <= 120


@given(st.integers(-1000, 1000))
def test_a_date_is_read_as_seconds_from_now(seconds):
    now = 1_700_000_000
    value = email.utils.formatdate(now + seconds, usegmt=True)
    assert retry_after(value, now) == min(max(seconds, 0), 120)


def test_a_date_without_a_zone_is_no_local_time(monkeypatch):
    monkeypatch.setenv("TZ", "XXX-9")
    time.tzset()
    try:
        assert retry_after("Tue, 14 Nov 2023 22:13:50 -0000", 1_700_000_000) == 30
    finally:
        monkeypatch.undo()
        time.tzset()


# Where the key may go


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:8000", "http://10.1.2.3", "http://192.168.0.9",
        "http://172.16.0.1:80/v1", "http://judge:8000/v1", "http://judge.ns.svc", "http://judge.ns.svc.cluster.local",
        "http://[fd00::1]/v1", "https://api.example.com/v1", "HTTPS://api.example.com", "https://8.8.8.8/v1",
        "http://100.64.0.7/v1",
    ],
)  # fmt: skip
def test_urls_that_a_key_may_be_sent_to(url):
    assert Endpoint(url, "m", KEY).url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com/v1", "http://8.8.8.8/v1", "http://[2001:4860:4860::8888]/v1", "http://134744072/v1",
        "http://0x08080808/v1", "http://localhost.example.com", "http://[::ffff:8.8.8.8]/v1",
        "http://10.1.2.3.example.com", "HTTP://api.example.com",
    ],
)  # fmt: skip
def test_plain_http_takes_a_key_to_private_hosts_only(url):
    with pytest.raises(UserError, match=r"would send the key in \$OPENAI_API_KEY unencrypted; use https"):
        Endpoint(url, "m", KEY)
    assert Endpoint(url, "m", "").url == url


@pytest.mark.parametrize(
    "url",
    [
        "", "host/v1", "localhost:8000/v1", "ftp://host/v1", "file:///etc/passwd", "https://", "https:///v1",
        "https://host:99999/v1", "https://host:x/v1", "https://host:0/", "https://[::1/v1", "https://a..b/v1", "https://ho st/v1",
        "https://host/v1\r\nX: y", "https://hóst/v1", f"https://{'a' * 64}.example/v1",
        "https://me:password@host/v1", "https://password@host/v1", "https://host/v1?key=password",
        "https://host/v1#password", "https://host/v1?",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_used_says_so_without_a_secret(url):
    with pytest.raises(UserError) as caught:
        Endpoint(url, "m", KEY)
    (line,) = caught.value.args
    assert re.fullmatch(r"endpoint: the URL (cannot be read|holds a user, a query or a fragment); .+", line)
    assert "password" not in line and KEY not in line


def lines_of(url):
    try:
        assert Endpoint(url, "m", KEY).url == url
    except UserError as error:
        return error.args
    return ()


@given(st.text() | st.text("htps:/[]@?#.%1a").map("https://".__add__))
def test_any_url_is_taken_or_refused_in_one_line(url):
    lines = lines_of(url)
    assert len(lines) <= 1 and all(line.isprintable() for line in lines)


@pytest.mark.parametrize("key", ["a b", "a\r\nX: y", "ключ", 'a"b', "a\\b", "a\x00", "\ud800"])
def test_a_key_that_is_none_is_refused_unseen(key):
    with pytest.raises(UserError) as caught:
        Endpoint("https://host/v1", "m", key)
    (line,) = caught.value.args
    assert "the key in $OPENAI_API_KEY has spaces" in line and key not in line


@pytest.mark.parametrize("proxy", ["https://proxy:1", "socks5://me:hidden@proxy", "http://[::1", "http://", "a:b:c"])
def test_a_proxy_that_cannot_be_used_says_so(monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(UserError, match=r"^endpoint: \$https_proxy must be http://HOST:PORT; [^\n]*$") as caught:
        Endpoint("https://api.example.com/v1", "m", KEY)
    assert "hidden" not in str(caught.value)
    for host in ("localhost", "sub.localhost", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]"):
        Endpoint(f"https://{host}/v1", "m", KEY)  # no proxy is used here


def test_https_checks_certificates():
    url = "HTTPS://LOCALHOST/v1"
    connection, target, _ = transport._connection(url, KEY, 5.0, transport.Wires(url).tls)
    assert isinstance(connection, http.client.HTTPSConnection) and target == "/v1"
    context = vars(connection)["_context"]
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


def test_a_certificate_that_nobody_knows_is_no_passing_failure(monkeypatch):
    def untrusted(_):
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", untrusted)
    url = "https://127.0.0.1/v1"
    failure = transport.exchange(transport.Wires(url), url, KEY, 5.0, b"{}")
    assert isinstance(failure, transport.Failure) and not failure.passing
    assert failure.line == (
        "certificate verify failed: self-signed certificate; set SSL_CERT_FILE to the certificate of its authority"
    )


# What is shown


@given(st.text(), st.text())
def test_any_text_is_one_short_line_without_the_key(before, after):
    line = transport.clean(f"{before}{KEY}{after}", KEY)
    assert len(line) <= 200 and (not line or line.isprintable()) and KEY not in line


@given(st.lists(st.sampled_from(["a", "word", "of", "it"]), max_size=30))
def test_words_stay_as_they_are(words):
    assert transport.clean("\n\t ".join(words), KEY) == " ".join(words)


@given(st.binary())
def test_any_body_says_something_or_nothing(body):
    assert isinstance(transport.said(body), str)


def test_a_failure_does_not_show_what_the_server_said():
    failure = transport.Failure("400 Bad Request: [key]", False, status=400, said=KEY)
    assert KEY not in repr(failure)
