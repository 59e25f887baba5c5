"""What a proxy is asked for: read in one way, or not at all."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.isolation.request_head import BadRequestError, Request, parse_request


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def for_server(*lines: str) -> list[str]:
    """The lines that the server gets."""
    return parse_request(head(*lines)).for_server("example.org").decode("latin-1").split("\r\n")[:-2]


def test_a_tunnel_is_for_a_host_and_a_port() -> None:
    assert parse_request(head("CONNECT example.org:443 HTTP/1.1", "Host: x")) == Request(
        "CONNECT", "example.org", 443, True
    )
    assert parse_request(head("CONNECT [2001:db8::1]:443 HTTP/1.0")).host == "[2001:db8::1]"


def test_the_server_gets_a_request_of_its_own() -> None:
    assert for_server("GET http://example.org/a?b=c HTTP/1.1", "Accept: */*", "X: y ") == [
        "GET /a?b=c HTTP/1.1",
        "Host: example.org",
        "Accept: */*",
        "X: y",
        "Connection: close",
    ]


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("http://example.org", "/"),
        ("http://example.org?q", "/?q"),
        ("HTTP://example.org//x", "//x"),
        ("http://example.org/http://evil.test/", "/http://evil.test/"),
    ],
)
def test_the_path_is_what_follows_the_host(target: str, path: str) -> None:
    assert for_server(f"GET {target} HTTP/1.1")[0] == f"GET {path} HTTP/1.1"


def test_the_host_is_the_one_of_the_url_alone() -> None:
    lines = for_server("GET http://example.org:8080/ HTTP/1.1", "Host: evil.test", "hOST: evil.test")

    assert [line for line in lines if line.lower().startswith("host")] == ["Host: example.org:8080"]


def test_what_concerns_the_connection_goes_no_further() -> None:
    lines = for_server(
        "GET http://example.org/ HTTP/1.1",
        "Connection: keep-alive, X-Named",
        "X-Named: 1",
        "Proxy-Connection: keep-alive",
        "Proxy-Authorization: Basic c2VjcmV0",
        "Upgrade: websocket",
        "TE: trailers",
    )

    assert lines == ["GET / HTTP/1.1", "Host: example.org", "Connection: close"]


def test_the_length_stays_also_where_it_is_named_as_one_of_the_connection() -> None:
    lines = for_server(
        "POST http://example.org/ HTTP/1.1", "Connection: content-length", "Content-Length: 007"
    )

    assert lines == ["POST / HTTP/1.1", "Host: example.org", "Content-Length: 7", "Connection: close"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["junk"], 400),
        ([""], 400),
        (["GET http://example.org/"], 400),
        (["GET http://example.org/ HTTP/2.0"], 400),
        (["GET http://example.org/ HTTP/1.1 "], 400),
        (["GET  http://example.org/ HTTP/1.1"], 400),
        (["GET\thttp://example.org/\tHTTP/1.1"], 400),
        (["GET http://example.org/\x00 HTTP/1.1"], 400),
        (["GET http://exämple.org/ HTTP/1.1"], 400),
        (["GET http://example.org/#x HTTP/1.1"], 400),
        (["GET / HTTP/1.1", "Host: example.org"], 400),
        (["GET //example.org/ HTTP/1.1"], 400),
        (["GET https://example.org/ HTTP/1.1"], 400),
        (["GET ftp://example.org/ HTTP/1.1"], 400),
        (["GET http:example.org HTTP/1.1"], 400),
        (["GET http:/// HTTP/1.1"], 400),
        (["GET http://:80/ HTTP/1.1"], 400),
        (["GET http://example.org:0/ HTTP/1.1"], 400),
        (["GET http://example.org:65536/ HTTP/1.1"], 400),
        (["OPTIONS * HTTP/1.1"], 400),
        (["PRI * HTTP/2.0"], 400),
        (["CONNECT example.org HTTP/1.1"], 400),
        (["CONNECT :443 HTTP/1.1"], 400),
        (["CONNECT example.org:0 HTTP/1.1"], 400),
        (["CONNECT example.org:443 HTTP/1.1", "Content-Length: 5"], 400),
        (["CONNECT example.org:443 HTTP/1.1", "Transfer-Encoding: chunked"], 411),
        (["POST http://example.org/ HTTP/1.1", "Transfer-Encoding: chunked"], 411),
        (["POST http://example.org/ HTTP/1.1", "Transfer-Encoding: x", "Content-Length: 3"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length: 3", "content-length: 3"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length: 3, 3"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length: +3"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length: -3"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length: 0x3"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length:"], 400),
        (["POST http://example.org/ HTTP/1.1", "Content-Length: " + "9" * 19], 400),
        (["GET http://example.org/ HTTP/1.1", "A: b", " folded"], 400),
        (["GET http://example.org/ HTTP/1.1", " A: b"], 400),
        (["GET http://example.org/ HTTP/1.1", "A : b"], 400),
        (["GET http://example.org/ HTTP/1.1", "A b"], 400),
        (["GET http://example.org/ HTTP/1.1", ": b"], 400),
        (["GET http://example.org/ HTTP/1.1", "A: b\nHost: evil.test"], 400),
        (["GET http://example.org/ HTTP/1.1", "A: b\rHost: evil.test"], 400),
        (["GET http://example.org/ HTTP/1.1\nHost: evil.test"], 400),
        (["GET http://example.org/ HTTP/1.1", "A: \0"], 400),
        (["GET http://example.org/ HTTP/1.1", "Transfer\x0b-Encoding: chunked"], 400),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(lines: list[str], status: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_request(head(*lines))

    assert caught.value.status == status


@pytest.mark.parametrize("filling", [" ", "\t", "a", "a ", ":", ",", "%", "\\", "[", "."])
def test_no_head_takes_long_to_refuse(filling: str) -> None:
    text = filling * (32_000 // len(filling))
    began = time.process_time()
    for data in (
        f"GET http://a/ HTTP/1.1\r\nA:{text}\0\r\n\r\n",
        f"GET http://a/ HTTP/1.1\r\nConnection:{text}\r\n\0",
        f"GET http://{text}\0/ HTTP/1.1\r\n\r\n",
        f"CONNECT {text}:0 HTTP/1.1\r\n\r\n",
        f"{text}\0\r\n\r\n",
    ):
        with pytest.raises(BadRequestError):
            parse_request(data.encode())
    assert time.process_time() - began < 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_bad_one(data: bytes) -> None:
    with contextlib.suppress(BadRequestError):
        parse_request(data)


@given(st.text(alphabet="abc:/?#@[]. \t\r\n%\\\0é", max_size=30), st.text(max_size=30))
def test_whatever_is_passed_on_is_one_request(target: str, value: str) -> None:
    data = f"GET http://{target} HTTP/1.1\r\nA: {value}\r\n\r\n".encode()
    with contextlib.suppress(BadRequestError):
        passed_on = parse_request(data).for_server("example.org")

        assert passed_on.count(b"\r\n\r\n") == 1
        assert passed_on.replace(b"\r\n", b"").translate(None, b"\t").find(b"\n") < 0
        assert passed_on.count(b"\r\nHost: ") == 1
