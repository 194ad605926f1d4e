"""Moves bytes to and from an endpoint: connections, TLS, proxies, one exchange with its limits, and the key's safety.

The transport of the fixed judge in endpoint.py (the baseline of paper 2.2). The key goes to the named host only:
redirects are not followed, plain http is for private hosts, a proxy sees no key, and what a server says back is
cleaned of it. Failures are values, since a chained exception would carry headers.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import html
import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from datetime import UTC
from typing import Any

ANSWER_BYTES, ERROR_BYTES = 32 << 20, 64 << 10
MESSAGE_CHARACTERS = 200
RETRY_AFTER_MOST = 120.0  # seconds: a server may ask for hours
# What may pass by itself; 520 to 524 and 529 are what proxies say of a busy or slow server behind them.
_PASSING = frozenset({408, 409, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


@dataclasses.dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        line: for the user, without the key.
        passing: another try may do.
        after: seconds that the server asks to wait before it.
        status: of HTTP, if the server refused the request; else 0.
        said: the server's own message then, whole and as it came: it may hold the key.
    """

    line: str
    passing: bool
    after: float = 0.0
    status: int = 0
    said: str = dataclasses.field(default="", repr=False)


class Wires:
    """The open sockets of one call, for cutting them from another thread: one at its deadline, all at the end."""

    def __init__(self, url: str) -> None:
        self.ended = threading.Event()
        # Once: it reads the certificates of all authorities.
        self.tls = ssl.create_default_context() if urllib.parse.urlsplit(url).scheme == "https" else None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    @contextlib.contextmanager
    def hold(self, wire: socket.socket, seconds: float) -> Iterator[threading.Event]:
        """Cuts the wire after so many seconds, which sets the event.

        A socket's own timeout is for one read: a server that sends a byte now and then would never meet it.
        """
        overdue = threading.Event()

        def late() -> None:
            overdue.set()
            _cut(wire)

        timer = threading.Timer(seconds, late)
        timer.daemon = True
        with self._lock:
            self._open.add(wire)
            if self.ended.is_set():
                _cut(wire)
        timer.start()
        try:
            yield overdue
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(wire)

    def end(self) -> None:
        with self._lock:
            self.ended.set()
            for wire in self._open:
                _cut(wire)


def _cut(wire: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        socket.socket.shutdown(wire, socket.SHUT_RDWR)  # not SSLSocket's, which drops the state a reader is using


def exchange(wires: Wires, url: str, key: str, timeout: float, data: bytes) -> bytes | Failure:
    """POSTs JSON over a connection of its own: a model's answer takes seconds, a handshake does not.

    Args:
        url: one that `problems` says nothing about.
        key: the bearer token; "" for none.
        timeout: seconds to connect, and again for the whole answer.

    Returns:
        the body of a good answer (status 2xx).
    """
    overdue = threading.Event()
    late = Failure(f"no whole answer in {timeout:g} s", True)
    connection, target, headers = _connection(url, key, timeout, wires.tls)
    try:
        connection.connect()
        with wires.hold(connection.sock, timeout) as overdue:
            connection.request("POST", target, data, headers)
            with contextlib.closing(connection.getresponse()) as response:
                good = 200 <= response.status < 300
                limit = ANSWER_BYTES if good else ERROR_BYTES
                body = response.read(limit + 1)
                left = response.length
    except TimeoutError:
        return late
    except (OSError, http.client.HTTPException) as error:
        line = clean(getattr(error, "strerror", None) or str(error) or type(error).__name__, key)
        if isinstance(error, ssl.SSLCertVerificationError):  # it stays untrusted; the key was not sent yet
            return Failure(f"{line}; set SSL_CERT_FILE to the certificate of its authority", False)
        return late if overdue.is_set() else Failure(line, True)
    finally:
        connection.close()
    if overdue.is_set():
        return late
    if not good:
        return _refusal(response, body, key)
    if len(body) > limit:
        return Failure(f"an answer of more than {limit >> 20} MiB; is this a chat-completions endpoint?", False)
    if left:
        return Failure(f"the answer was cut after {len(body)} of {len(body) + left} bytes", True)
    return body


def _refusal(response: http.client.HTTPResponse, body: bytes, key: str) -> Failure:
    status = response.status
    line = f"{status} {clean(response.reason or '', key)}".strip()
    if 300 <= status < 400:
        to = clean(response.headers.get("Location", ""), key) or "nowhere"
        return Failure(f"{line}: redirects to {to}; not followed, the key is for this URL: give the right one", False)
    whole = said(body)
    if shown := clean(whole, key):
        line += f": {shown}"
    after = retry_after(response.headers.get("Retry-After"), time.time())
    return Failure(line, status in _PASSING, after, status, whole)


def retry_after(value: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks for, from 0 to 120; 0 if it says nothing that can be read.

    Args:
        value: seconds or an HTTP date.
        now: seconds since the epoch.
    """
    if value is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{0,15})?", value.strip()):
        return min(float(value), RETRY_AFTER_MOST)
    try:
        date = email.utils.parsedate_to_datetime(value)
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_MOST)


def parsed(body: bytes) -> Any:
    """What the JSON says; None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def said(body: bytes) -> str:
    """A server's own message: of the usual places in JSON, else the page's text. It may hold the key."""
    data = parsed(body)
    for name in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(name):
            data = data[name]
    if isinstance(data, str):
        return data
    if data is None:
        return html.unescape(re.sub(r"<[^<>]*>", " ", body[:ERROR_BYTES].decode(errors="replace")))
    try:  # written anew: the server's own escapes could hide the key
        return json.dumps(data, ensure_ascii=False)[:ERROR_BYTES]
    except RecursionError:
        return ""


def clean(text: str, key: str) -> str:
    """One line of at most 200 characters without control characters and without the key."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if key:  # in one piece, or in pieces that stood apart by tags or control characters
        line = re.sub(" ?".join(map(re.escape, key)), "[key]", line)
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 3] + "..."


def problems(url: str, key: str, variable: str) -> Iterator[str]:
    """Why a key may not be sent to a URL, a line each, none with the key or a URL that may hold a password.

    Args:
        variable: the environment variable that holds the key.
    """
    # A header takes no line ends; quotes and backslashes would be escaped in a server's message, and so shown.
    if not re.fullmatch(r"[!#-\[\]-~]*", key):
        yield f"endpoint: the key in ${variable} has spaces, line ends or other characters that no key has"
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https"):
        yield "endpoint: the URL cannot be read; give one such as https://host/v1"
    elif "@" in parts.netloc or "?" in url or "#" in url:
        yield f"endpoint: the URL holds a user, a query or a fragment; give its plain part, and a key in ${variable}"
    elif parts.scheme == "http" and key and not _is_private(parts.hostname or ""):
        yield f"endpoint {url}: would send the key in ${variable} unencrypted; use https, or unset ${variable}"
    elif (proxy := _proxy(url, bool(key))) and not (_split(proxy) and proxy.startswith("http://")):
        yield f"endpoint: ${parts.scheme}_proxy must be http://HOST:PORT; change it, or name the host in $no_proxy"


def _split(url: str) -> urllib.parse.SplitResult | None:
    """The parts of a URL whose host and port can be used, or None."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:
        return None
    return parts if re.fullmatch(r"[!-~]+", url) and host and port != 0 else None


def _connection(
    url: str, key: str, timeout: float, tls: ssl.SSLContext | None
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection that is not open yet, the request's target and its headers."""
    parts, proxy = urllib.parse.urlsplit(url), urllib.parse.urlsplit(_proxy(url, bool(key)))
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    target = parts.path
    headers = {"Content-Type": "application/json", "User-Agent": "selfreward_jax", "Connection": "close"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    at = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, port)
    if secure:
        connection = http.client.HTTPSConnection(*at, timeout=timeout, context=tls)
    else:
        connection = http.client.HTTPConnection(*at, timeout=timeout)
    connection.set_debuglevel(0)  # a level set for all connections would print the headers
    if proxy.hostname:
        user = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}").encode()
        permit = {"Proxy-Authorization": f"Basic {base64.b64encode(user).decode()}"} if proxy.username else {}
        if secure:
            connection.set_tunnel(host, port, permit)
        else:
            target, headers = f"http://{parts.netloc}{target}", headers | permit
    return connection, target, headers


def _proxy(url: str, with_key: bool) -> str:
    """The proxy that the environment names for a URL (https_proxy, http_proxy, no_proxy), "" if none is to be used.

    None is used to this machine, and none for a key in plain http, which the proxy could read.
    """
    parts = urllib.parse.urlsplit(url)
    found = urllib.request.getproxies().get(parts.scheme, "")
    if _is_loopback(parts.hostname or "") or (with_key and parts.scheme == "http"):
        return ""
    if not found or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return found if "://" in found else f"http://{found}"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address.is_loopback if address else host == "localhost" or host.endswith(".localhost")


def _is_private(host: str) -> bool:
    """Whether a host is this machine or of a private network, as far as its name tells; nothing is looked up."""
    if address := _address(host):
        return not address.is_global
    # A name without a dot is local; one that begins with a digit could be an address in an old notation.
    local = (".localhost", ".local", ".internal", ".svc", ".home.arpa")
    return bool(re.fullmatch(r"[a-z][a-z0-9_-]*", host)) or host.endswith(local)
