"""The Server Name in hellos that ssl makes, and in ones that nobody should make."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterable

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.isolation.client_hello import (
    ClientHello,
    MalformedHelloError,
    NotTlsError,
    read_client_hello,
)


def real_hello(name: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = real_hello("example.org")


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names)))


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def body(*extensions: bytes) -> bytes:
    return (
        b"\x03\x03"
        + bytes(32)
        + vector(1, b"")
        + vector(2, b"\x13\x01")
        + vector(1, b"\0")
        + (vector(2, b"".join(extensions)) if extensions else b"")
    )


def message(content: bytes, kind: int = 1) -> bytes:
    return bytes([kind]) + vector(3, content)


def record(fragment: bytes, kind: int = 22, version: bytes = b"\x03\x01") -> bytes:
    return bytes([kind]) + version + vector(2, fragment)


def in_records(content: bytes, sizes: Iterable[int]) -> bytes:
    data = b""
    for size in sizes:
        data, content = data + record(content[:size]), content[size:]
    return data + (record(content) if content else b"")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["example.org", "a.b.example.org", "xn--bcher-kva.example"])
def test_a_real_hello_says_its_server_name(name: str, version: ssl.TLSVersion) -> None:
    assert read_client_hello(real_hello(name, version)) == ClientHello(name)


def test_a_real_hello_to_an_address_has_none() -> None:
    assert read_client_hello(real_hello("192.0.2.1")) == ClientHello(None)
    assert read_client_hello(real_hello(None)) == ClientHello(None)


def test_what_follows_in_further_records_is_not_looked_at() -> None:
    assert read_client_hello(HELLO + record(b"early data", kind=23)) == ClientHello("example.org")


def test_every_beginning_of_a_hello_needs_more() -> None:
    for end in range(len(HELLO)):
        assert read_client_hello(HELLO[:end]) is None


@given(st.lists(st.integers(1, 200), max_size=14))
def test_a_hello_in_several_records_is_the_same(sizes: list[int]) -> None:
    assert read_client_hello(in_records(HELLO[5:], sizes)) == ClientHello("example.org")


def test_hellos_made_here_are_understood() -> None:
    assert read_client_hello(record(message(body(server_name(b"example.org"))))) == ClientHello("example.org")
    assert read_client_hello(record(message(body()))) == ClientHello(None)
    assert read_client_hello(record(message(body(extension(16, b""))))) == ClientHello(None)


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE])
def test_a_hello_with_another_one_encrypted_in_it_says_so(kind: int) -> None:
    data = record(message(body(server_name(b"example.org"), extension(kind, bytes(100)))))

    assert read_client_hello(data) == ClientHello("example.org", is_encrypted=True)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0\0\0\x08\x04\xd2\x16\x2f",  # PostgreSQL asks for TLS
        b"\x10\x20\0\x04MQTT",
        b"\x16\x02\x01",
        b"\x16\x00",
        b"\x94\x00\x01\xa5hello",
        b"\xff\xfd\x03",
        b"\x80\x00\x01\x05\x00",
    ],
)
def test_something_else_is_not_tls(data: bytes) -> None:
    with pytest.raises(NotTlsError):
        read_client_hello(data)


GOOD = server_name(b"example.org")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(record(b"\x02\x28", kind=21), id="an alert before it, which OpenSSL passes over"),
        pytest.param(record(b"\x01\x00", kind=21) + HELLO, id="an alert and a hello"),
        pytest.param(record(b"\x01", kind=20) + HELLO, id="a change of ciphers and a hello"),
        pytest.param(record(b"data", kind=23), id="data"),
        pytest.param(record(message(body(GOOD), kind=2)), id="a ServerHello"),
        pytest.param(record(b"") + HELLO, id="an empty record"),
        pytest.param(b"\x16\x03\x01\x40\x01", id="a record that is too long"),
        pytest.param(record(b"\x01\x00\x40\x00"), id="a hello that is too long"),
        pytest.param(record(b"\x01\xff\xff\xff"), id="one that never ends"),
        pytest.param(record(message(body(GOOD)) + b"\x01"), id="something after it in its record"),
        pytest.param(record(message(body(GOOD) + b"\0")), id="something after the extensions"),
        pytest.param(record(message(body(GOOD, GOOD))), id="two Server Names"),
        pytest.param(record(message(body(server_name(b"a.test", b"b.test")))), id="two names in one"),
        pytest.param(record(message(body(server_name(b"")))), id="an empty name"),
        pytest.param(record(message(body(server_name()))), id="no name in it"),
        pytest.param(record(message(body(server_name(b"a.test", kind=1)))), id="a name of another kind"),
        pytest.param(record(message(body(server_name("é.test".encode())))), id="a name that is not ASCII"),
        pytest.param(record(message(body(extension(0, b"\0\x05\0\0\x09a")))), id="lengths that do not fit"),
        pytest.param(record(message(body(GOOD)[:-1])), id="extensions that end too early"),
        pytest.param(record(message(b"")), id="nothing in it"),
        pytest.param(in_records(HELLO[5:], [1] * 16), id="many tiny pieces"),
        pytest.param(record(HELLO[5:105]) + record(b"x", kind=23), id="other records between its pieces"),
        pytest.param(b"\x80\x2e\x01\x03\x01" + bytes(43), id="a hello of SSL 2 for SSL 3 or TLS"),
        pytest.param(b"\x80\x2e\x01\x00\x02" + bytes(43), id="a hello of SSL 2"),
    ],
)
def test_a_malformed_hello_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedHelloError):
        read_client_hello(data)


def test_a_name_with_a_nul_in_it_is_not_cut() -> None:
    hello = read_client_hello(record(message(body(server_name(b"example.org\0.evil.test")))))

    assert hello == ClientHello("example.org\0.evil.test")


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(NotTlsError, MalformedHelloError):
        read_client_hello(data)


@given(st.binary(max_size=600), st.lists(st.integers(1, 300), max_size=5))
def test_any_bytes_in_a_hello_are_read_or_refused(content: bytes, sizes: list[int]) -> None:
    with contextlib.suppress(MalformedHelloError):
        assert read_client_hello(in_records(message(content), sizes)) is not None


@given(st.integers(5, len(HELLO) - 1), st.integers(0, 255))
def test_a_hello_with_one_byte_changed_never_waits_for_more_than_its_limit(at: int, value: int) -> None:
    data = HELLO[:at] + bytes([value]) + HELLO[at + 1 :]
    with contextlib.suppress(MalformedHelloError):
        read_client_hello(data)
        assert read_client_hello(data + bytes(40_000)) is not None


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8))
def test_what_was_decided_does_not_change_with_more_bytes(pieces: list[bytes]) -> None:
    """Whatever is passed on was judged for good."""
    data, decided = b"", None
    for piece in pieces:
        data += piece
        try:
            now: object = read_client_hello(data)
        except (NotTlsError, MalformedHelloError) as error:
            now = type(error)
        assert decided in (None, now)
        decided = now
