"""The way out: real sockets on loopback, which the machine's own name makes reachable, and attacks on it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from code_sandboxes.isolation import hosts, proxy
from code_sandboxes.isolation.egress import Egress, Service, the_egress
from code_sandboxes.isolation.hosts import HOST_NAME, AllowedHosts
from code_sandboxes.isolation.network_log import NetworkLog
from code_sandboxes.keeper import lines
from conftest import open_descriptors, wait_until
from tests.isolation.test_client_hello import body, extension, message, real_hello, record, server_name

MIB = 1024**2
RESET = struct.pack("ii", 1, 0)

Handler = Callable[[socket.socket], None]


class Origin:
    """A server on loopback, or at *address*, that does with each connection what the test wants."""

    def __init__(self, handler: Handler, address: str = "127.0.0.1") -> None:
        self._handler = handler
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._handler(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Proxied:
    """A proxy, and a program's side of it."""

    def __init__(self, egress: Egress, entries: list[str]) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        self.log = NetworkLog()
        self.service: Service = egress.serve(listener, AllowedHosts(entries), self.log)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def ask(self, request: bytes) -> bytes:
        """All that comes back, with the connection left open on this side."""
        with self.connect() as client:
            client.sendall(request)
            return everything(client)

    def tunnel(self, target: str) -> socket.socket:
        client = self.connect()
        client.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert read_head(client).startswith(b"HTTP/1.1 200 ")
        return client

    def refusals(self) -> list[str]:
        return [attempt.reason for attempt in self.log.attempts() if not attempt.allowed]


def everything(connection: socket.socket) -> bytes:
    received = bytearray()
    while chunk := connection.recv(65536):
        received += chunk
    return bytes(received)


def read_head(connection: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            break
        received += byte
    return received


def echo(connection: socket.socket) -> None:
    while chunk := connection.recv(65536):
        connection.sendall(chunk)


def say_ok(connection: socket.socket) -> None:
    read_head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


class Names:
    """A name server."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.addresses[host]


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture
def egress(names: Names) -> Iterator[Egress]:
    egress = Egress(names)
    yield egress
    egress.close()


@pytest.fixture
def serve(egress: Egress) -> Callable[..., Proxied]:
    return lambda *entries: Proxied(egress, list(entries))


@pytest.fixture
def start_origin() -> Iterator[Callable[..., Origin]]:
    started: list[Origin] = []

    def start(handler: Handler, address: str = "127.0.0.1") -> Origin:
        started.append(Origin(handler, address))
        return started[-1]

    yield start
    for origin in started:
        origin.close()


def own_address() -> str:
    """One of this machine's that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    pytest.skip("this machine has no address but loopback")


# What is allowed


def test_a_program_reaches_what_is_allowed_by_http_and_by_connect(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    origin = start_origin(say_ok)
    target = f"{HOST_NAME}:{origin.port}"
    proxied = serve(target)

    answer = proxied.ask(f"GET http://{target}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    with proxied.tunnel(target) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert everything(client) == answer

    assert answer.endswith(b"\r\n\r\nok")
    assert [
        (each.host, each.port, each.allowed, each.reason, each.address) for each in proxied.log.attempts()
    ] == [(HOST_NAME, origin.port, True, "", "127.0.0.1")] * 2


def test_urllib_needs_nothing_but_the_variable(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    origin = start_origin(say_ok)
    proxied = serve(f"{HOST_NAME}:{origin.port}")
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({"http": f"http://127.0.0.1:{proxied.port}"})
    )

    assert opener.open(f"http://{HOST_NAME}:{origin.port}/x", timeout=30).read() == b"ok"
    with pytest.raises(urllib.error.HTTPError, match="blocked by network_policy: other"):
        opener.open("http://other.test/", timeout=30)


def test_a_refused_tunnel_says_why_in_the_line_that_programs_show(serve: Callable[..., Proxied]) -> None:
    proxied = serve("example.org")
    connection = http.client.HTTPSConnection("127.0.0.1", proxied.port, timeout=30)
    connection.set_tunnel("other.test", 443)

    with pytest.raises(
        OSError, match=r"403 blocked by network_policy: other\.test:443 is not in allowed_hosts"
    ):
        connection.request("GET", "/")
    connection.close()


def test_an_allowed_name_is_resolved_once_and_connected_to_at_the_address_that_was_checked(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin], names: Names
) -> None:
    address = own_address()
    origin = start_origin(say_ok, address)
    names.addresses = {"service.test": [address]}
    proxied = serve(f"*.test:{origin.port}", f"{address}:{origin.port}")

    answer = proxied.ask(f"GET http://Service.TEST.:{origin.port}/ HTTP/1.1\r\n\r\n".encode())

    assert answer.endswith(b"ok")
    assert names.asked == ["service.test"]
    assert proxied.log.attempts()[0].address == address


def test_the_next_address_is_tried_where_nobody_answers_at_the_first(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    try:
        origin = start_origin(say_ok, "::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    proxied = serve(f"{HOST_NAME}:{origin.port}")

    assert proxied.ask(f"GET http://{HOST_NAME}:{origin.port}/ HTTP/1.1\r\n\r\n".encode()).endswith(b"ok")
    assert proxied.log.attempts()[0].address == "::1"


def test_a_service_of_this_machine_is_not_reached_by_its_address_in_a_network(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin], names: Names
) -> None:
    address = own_address()
    origin = start_origin(say_ok, address)
    names.addresses = {"service.test": [address]}
    proxied = serve(f"service.test:{origin.port}", "10.0.0.0/8:*", "172.16.0.0/12:*", "192.168.0.0/16:*")

    answers = [
        proxied.ask(f"GET http://{host}:{origin.port}/ HTTP/1.1\r\n\r\n".encode())
        for host in ("service.test", address)
    ]

    assert all(answer.startswith(b"HTTP/1.1 403 ") for answer in answers)
    assert origin.connections == 0


# What is refused

ALLOWED = ["allowed.test", "*.suffix.test"]
ADDRESSES = {
    "a.suffix.test": ["127.0.0.1"],
    "b.suffix.test": ["169.254.169.254"],
    "c.suffix.test": ["93.184.216.34", "10.0.0.1"],
    "d.suffix.test": ["::ffff:127.0.0.1"],
    "e.suffix.test": ["::1"],
    "f.suffix.test": ["0.0.0.0"],
    "g.suffix.test": ["fe80::1%lo"],
    "h.suffix.test": ["64:ff9b::7f00:1"],
    "i.suffix.test": ["2002:7f00:1::"],
    "j.suffix.test": ["224.0.0.1"],
}


@pytest.mark.parametrize(
    "target",
    [
        "other.test:443",
        "allowed.test:8080",
        "allowed.test:22",
        "evilallowed.test:443",
        "allowed.test.evil.test:443",
        "suffix.test:443",
        "evilsuffix.test:443",
        "127.0.0.1:80",
        "127.0.0.1:3128",
        "2130706433:80",
        "0x7f000001:80",
        "0x7f.1:80",
        "0177.0.0.1:80",
        "127.1:80",
        "0:80",
        "0.0.0.0:80",
        "[::]:80",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[::ffff:7f00:1]:80",
        "[64:ff9b::7f00:1]:80",
        "[fe80::1%25lo]:80",
        "[fe80::1%lo]:80",
        "[127.0.0.1]:80",
        "::1:80",
        "169.254.169.254:80",
        "localhost:80",
        "localhost.:80",
        "x.localhost:80",
        f"{HOST_NAME}:80",
        f"x.{HOST_NAME}:80",
        "allowed.test@evil.test:443",
        "allowed.test:443@evil.test:443",
        "user:password@allowed.test:443",
        "allowed.test..:443",
        "allowed..test:443",
        ".allowed.test:443",
        "-a.suffix.test:443",
        "allowed%2etest:443",
        "allowed.test%00.evil.test:443",
        "allowed.test\\.evil.test:443",
        "*.suffix.test:443",
        "xn--.suffix.test-:443",
        "a" * 64 + ".suffix.test:443",
        "a." * 126 + "suffix.test:443",
        *(f"{name}:443" for name in ADDRESSES),
    ],
)
@pytest.mark.parametrize(
    "form", ["CONNECT {0} HTTP/1.1\r\n\r\n", "GET http://{0}/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n"]
)
def test_a_trick_is_answered_with_403_and_remembered(
    target: str, form: str, serve: Callable[..., Proxied], names: Names
) -> None:
    names.addresses = ADDRESSES
    proxied = serve(*ALLOWED)

    answer = proxied.ask(form.format(target).encode())

    assert answer.startswith(b"HTTP/1.1 403 blocked by network_policy: "), answer
    assert len(proxied.log.attempts()) == 1
    assert not proxied.log.attempts()[0].allowed
    assert proxied.log.attempts()[0].reason in answer.decode()
    assert set(names.asked) <= set(ADDRESSES), "a name that is not allowed went out"


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "localhost", HOST_NAME, "[", "169.254.169.254"])
def test_policy_none_refuses_everything_and_says_so(
    host: str, serve: Callable[..., Proxied], names: Names
) -> None:
    proxied = serve()

    for request in (f"CONNECT {host}:443 HTTP/1.1\r\n\r\n", f"GET http://{host}/ HTTP/1.1\r\n\r\n"):
        assert proxied.ask(request.encode()).startswith(b'HTTP/1.1 403 blocked: network_policy is "none"')
    assert proxied.refusals() == ['network_policy is "none"'] * 2
    assert names.asked == []


@pytest.mark.parametrize(
    "request_",
    [
        b"junk\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello\r\n\r\n",
        b"\x05\x01\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"GET http://allowed.test/ HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET http://allowed.test/ HTTP/1.1\nHost: x\n\r\n\r\n",
        b"POST http://allowed.test/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET http://allowed.test/ HTTP/1.1\r\nA: " + b"a" * 40_000,
        b"a" * 40_000,
    ],
)
def test_nonsense_is_answered_with_400_and_goes_nowhere(
    request_: bytes, serve: Callable[..., Proxied], names: Names
) -> None:
    proxied = serve(*ALLOWED)

    assert proxied.ask(request_).startswith(b"HTTP/1.1 400 ")
    assert names.asked == []
    assert len(proxied.refusals()) == 1


def test_what_code_has_named_a_host_is_no_command_to_a_terminal(serve: Callable[..., Proxied]) -> None:
    proxied = serve(*ALLOWED)

    answer = proxied.ask(b"GET http://a/ HTTP/1.1\r\nX: \x1b[2J\r\n\r\n")
    answer += proxied.ask(b"GET \x1b]0;evil\x07 HTTP/1.1\r\n\r\n")

    assert b"\x1b" not in answer
    assert all(attempt.host.isprintable() for attempt in proxied.log.attempts())


def test_what_cannot_be_reached_is_no_refusal(serve: Callable[..., Proxied], names: Names) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    proxied = serve("allowed.test", f"{HOST_NAME}:{port}")

    unknown = proxied.ask(b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\n")
    closed = proxied.ask(f"CONNECT {HOST_NAME}:{port} HTTP/1.1\r\n\r\n".encode())

    assert unknown.startswith(b"HTTP/1.1 502 cannot resolve allowed.test: ")
    assert closed.startswith(f"HTTP/1.1 502 cannot connect to {HOST_NAME}:{port}: ".encode())
    assert proxied.refusals() == []
    assert [attempt.address for attempt in proxied.log.attempts()] == ["", ""]


# One request, and no other


def test_a_second_request_goes_nowhere(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    received: list[bytes] = []

    def keep_alive(connection: socket.socket) -> None:
        received.append(everything(connection))  # whatever "Connection: close" says

    origin = start_origin(keep_alive)
    target = f"{HOST_NAME}:{origin.port}"
    proxied = serve(target)
    second = f"GET http://{target}/second HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
    with proxied.connect() as client:
        client.sendall(
            f"POST http://{target}/first HTTP/1.1\r\nHost: evil.test\r\nContent-Length: 4\r\n\r\nbo".encode()
        )
        client.sendall(b"dy" + second)
        client.sendall(second)
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b""

    assert received == [
        f"POST /first HTTP/1.1\r\nHost: {target}\r\n".encode()
        + b"Content-Length: 4\r\nConnection: close\r\n\r\nbody"
    ]


def test_an_answer_that_comes_before_the_body_was_sent_arrives(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    def too_large(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        everything(connection)  # or the system would reset the connection

    target = f"{HOST_NAME}:{start_origin(too_large).port}"

    answer = serve(target).ask(f"POST http://{target}/ HTTP/1.1\r\nContent-Length: 99\r\n\r\nx".encode())

    assert answer == b"HTTP/1.1 413 Too Large\r\n\r\n"


# TLS names the host


@pytest.fixture
def on_default_ports(
    monkeypatch: pytest.MonkeyPatch,
    serve: Callable[..., Proxied],
    start_origin: Callable[..., Origin],
    names: Names,
) -> tuple[Proxied, str, Origin]:
    """A proxy that allows a name without a port, and a server at one that counts as a default port."""
    address = own_address()
    origin = start_origin(echo, address)
    monkeypatch.setattr(hosts, "DEFAULT_PORTS", (origin.port,))
    names.addresses = {"allowed.test": [address]}
    return serve("allowed.test", address), f"allowed.test:{origin.port}", origin


GOOD = real_hello("allowed.test")


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([GOOD], id="at once"),
        pytest.param([GOOD[:1], GOOD[1:100], GOOD[100:]], id="in pieces"),
        pytest.param([real_hello("Allowed.TEST")], id="in capitals"),
        pytest.param([GOOD + b"more"], id="with more"),
    ],
)
def test_tls_that_names_the_host_passes_unchanged(
    sent: list[bytes], on_default_ports: tuple[Proxied, str, Origin]
) -> None:
    proxied, target, _ = on_default_ports
    with proxied.tunnel(target) as client:
        for piece in sent:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b"".join(sent)

    assert [attempt.allowed for attempt in proxied.log.attempts()] == [True]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (real_hello("evil.test"), "names 'evil.test', not the host of the tunnel (allowed.test)"),
        (real_hello("x.allowed.test"), "names 'x.allowed.test'"),
        (real_hello(None), "does not name the host"),
        (
            record(message(body(server_name(b"allowed.test\0.evil.test")))),
            "names 'allowed.test\\x00.evil.test'",
        ),
        (
            record(message(body(server_name(b"allowed.test"), extension(0xFE0D, bytes(9))))),
            "(ECH) cannot be checked",
        ),
        (record(message(body(server_name(b"allowed.test", b"evil.test")))), "malformed"),
        (record(b"\x01\x00", kind=21) + real_hello("evil.test"), "does not begin with a ClientHello"),
        (b"\x80\x2e\x01\x03\x01" + bytes(43), "SSL 2"),
    ],
)
@pytest.mark.parametrize("named", ["no port", "the port"])
def test_tls_that_does_not_is_refused_with_an_alert(
    named: str,
    sent: bytes,
    reason: str,
    on_default_ports: tuple[Proxied, str, Origin],
    serve: Callable[..., Proxied],
) -> None:
    proxied, target, origin = on_default_ports
    if named == "the port":
        proxied = serve(target, f"{own_address()}:{origin.port}")
    with proxied.tunnel(target) as client:
        client.sendall(sent)
        assert everything(client) == bytes([21, 3, 3, 0, 2, 2, 49])

    (refusal,) = proxied.refusals()
    assert reason in refusal


def test_a_hello_that_breaks_off_is_not_passed_on(on_default_ports: tuple[Proxied, str, Origin]) -> None:
    proxied, target, _ = on_default_ports
    with proxied.tunnel(target) as client:
        client.sendall(GOOD[:50])
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == bytes([21, 3, 3, 0, 2, 2, 49])


def test_on_a_default_port_anything_but_tls_is_refused_in_words(
    on_default_ports: tuple[Proxied, str, Origin],
) -> None:
    proxied, target, _ = on_default_ports
    with proxied.tunnel(target) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")
        answer = everything(client)

    assert answer.startswith(b"HTTP/1.1 403 blocked by network_policy: it is not TLS")
    assert f"add '{target}' to allowed_hosts" in proxied.refusals()[0]


def test_a_tunnel_to_an_address_needs_no_server_name_and_takes_no_other(
    on_default_ports: tuple[Proxied, str, Origin],
) -> None:
    proxied, _, origin = on_default_ports
    target = f"{own_address()}:{origin.port}"
    hello = real_hello(None)
    with proxied.tunnel(target) as client:
        client.sendall(b"\x16")
        client.sendall(hello[1:])
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == hello
    with proxied.tunnel(target) as client:
        client.sendall(real_hello("evil.test"))
        assert everything(client) == bytes([21, 3, 3, 0, 2, 2, 49])


def test_on_a_named_port_the_server_may_speak_first(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"220 ready\r\n")
        echo(connection)

    target = f"{HOST_NAME}:{start_origin(greet).port}"
    proxied = serve(target)
    with proxied.tunnel(target) as client:
        assert client.recv(100) == b"220 ready\r\n"
        wait_until(proxied.log.attempts)  # it is known before the client says anything
        client.sendall(b"EHLO\r\n")
        assert client.recv(100) == b"EHLO\r\n"

    with proxied.tunnel(target) as client:
        assert client.recv(100) == b"220 ready\r\n"
        client.sendall(real_hello("evil.test"))
        assert everything(client) == b"", "what the server says in its own words gets no alert in the middle"
    assert len(proxied.refusals()) == 1


def certificate(folder: Path) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the program openssl, which makes a certificate, is not installed")
    path = folder / "certificate.pem"
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout"
    subject = ["-subj", f"/CN={HOST_NAME}", "-addext", f"subjectAltName=DNS:{HOST_NAME}"]
    only = folder / "only"
    subprocess.run(
        [openssl, *arguments.split(), path, "-out", only, *subject], check=True, capture_output=True
    )
    path.write_bytes(path.read_bytes() + only.read_bytes())
    return path


def test_tls_between_real_ends(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin], tmp_path: Path
) -> None:
    pem = certificate(tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(pem)

    def secured(connection: socket.socket) -> None:
        if connection.recv(1, socket.MSG_PEEK):  # where it was reset, wrap_socket() would leak it
            with server_side.wrap_socket(connection, server_side=True) as wrapped:
                echo(wrapped)

    client_side = ssl.create_default_context(cafile=pem)
    target = f"{HOST_NAME}:{start_origin(secured).port}"
    proxied = serve(target)

    with client_side.wrap_socket(proxied.tunnel(target), server_hostname=HOST_NAME) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
    with pytest.raises(ssl.SSLError, match=r"(?i)access.denied"):
        client_side.wrap_socket(proxied.tunnel(target), server_hostname="evil.test")


# How connections end, and what they cost


def test_each_direction_ends_for_itself(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    def answer_at_the_end(connection: socket.socket) -> None:
        connection.sendall(str(len(everything(connection))).encode())

    target = f"{HOST_NAME}:{start_origin(answer_at_the_end).port}"
    with serve(target).tunnel(target) as client:
        client.sendall(b"x" * 1_000_000)
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b"1000000"


def test_half_a_download_does_not_pass_for_all_of_it(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    def break_off(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
        connection.recv(1)  # until it was read
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    target = f"{HOST_NAME}:{start_origin(break_off).port}"
    with serve(target).tunnel(target) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(100).endswith(b"half of")
        client.sendall(b"!")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@pytest.mark.parametrize("request_", ["CONNECT {0} HTTP/1.1\r\n\r\n", "GET http://{0}/ HTTP/1.1\r\n\r\n"])
def test_a_client_that_is_gone_is_gone_for_the_server_too(
    request_: str, serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    ended = threading.Event()

    def listen(connection: socket.socket) -> None:
        try:
            everything(connection)
        finally:
            ended.set()

    origin = start_origin(listen)
    target = f"{HOST_NAME}:{origin.port}"
    with serve(target).connect() as client:
        client.sendall(request_.format(target).encode())
        wait_until(lambda: origin.connections)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    assert ended.wait(30)


def test_closing_ends_its_connections_and_leaves_those_of_others(
    egress: Egress, serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    target = f"{HOST_NAME}:{start_origin(echo).port}"
    one, other = serve(target), serve(target)
    with one.tunnel(target) as ended, one.connect() as idle, other.tunnel(target) as living:
        one.service.close()
        one.service.close()
        for connection in (ended, idle):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        living.sendall(b"x")
        assert living.recv(1) == b"x"
    assert one.service.wait_closed(30)
    with pytest.raises(ConnectionRefusedError):
        one.connect()


def test_a_proxy_that_is_closed_before_it_began_closes_its_socket(egress: Egress) -> None:
    before = open_descriptors()
    egress.serve(socket.create_server(("127.0.0.1", 0)), AllowedHosts([]), NetworkLog()).wait_closed(0)
    ended = [
        egress.serve(socket.create_server(("127.0.0.1", 0)), AllowedHosts([]), NetworkLog())
        for _ in range(20)
    ]
    for service in ended:
        service.close()
    assert all(service.wait_closed(30) for service in ended)

    egress.close()
    assert open_descriptors() <= before


def test_descriptors_and_threads_are_as_before_when_all_has_ended(
    start_origin: Callable[..., Origin], names: Names
) -> None:
    origin = start_origin(echo)
    target = f"{HOST_NAME}:{origin.port}"
    before, threads = open_descriptors(), set(threading.enumerate())
    egress = Egress(names)
    proxied = Proxied(egress, [target])
    clients = [proxied.tunnel(target) for _ in range(20)]
    clients += [proxied.connect() for _ in range(20)]
    for number, client in enumerate(clients):
        if number % 2:
            client.close()
    egress.close()
    egress.close()
    for client in clients:
        client.close()

    wait_until(lambda: open_descriptors() <= before and set(threading.enumerate()) <= threads)


def test_who_does_not_read_stops_who_writes(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    sent = 0
    is_stuck = threading.Event()

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        while select.select([], [connection], [], 0.1)[1]:
            sent += connection.send(bytes(MIB))
        is_stuck.set()

    target = f"{HOST_NAME}:{start_origin(pour).port}"
    with serve(target).tunnel(target):
        assert is_stuck.wait(60)

    assert sent < 32 * MIB, "what nobody reads is kept by nobody but the system's own buffers"


def test_a_head_that_does_not_end_is_not_waited_for(
    serve: Callable[..., Proxied], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "_HEAD", 0.05)
    with serve().connect() as client:
        client.setblocking(False)
        while not select.select([client], [], [], 0.005)[0]:
            client.send(b"a")  # it never stops coming
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_tunnel_in_which_nothing_happens_ends(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "_IDLE", 0.05)
    target = f"{HOST_NAME}:{start_origin(echo).port}"
    with serve(target).tunnel(target) as client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_names_that_nobody_answers_for_hold_up_no_other_sandbox() -> None:
    asked, answer = threading.Semaphore(0), threading.Event()

    def wait(host: str, port: int) -> list[str]:
        asked.release()
        answer.wait(60)
        return ["127.0.0.1"]

    silent = Egress(wait)
    try:
        one, other = Proxied(silent, ["*.slow.test"]), Proxied(silent, ["b.test"])
        clients = [one.connect() for _ in range(50)]
        for number, client in enumerate(clients):
            client.sendall(f"CONNECT {number}.slow.test:443 HTTP/1.1\r\n\r\n".encode())
        for _ in range(8):
            assert asked.acquire(timeout=30)
        with other.connect() as client:
            client.sendall(b"CONNECT b.test:443 HTTP/1.1\r\n\r\n")
            assert asked.acquire(timeout=30)  # the ninth: of the other sandbox
            assert not asked.acquire(blocking=False)
            answer.set()
            assert client.recv(20).startswith(b"HTTP/1.1 403 ")
        for client in clients:
            client.close()
    finally:
        answer.set()
        silent.close()


@pytest.mark.slow
def test_a_thousand_connections_do_not_keep_it_from_serving(
    serve: Callable[..., Proxied], start_origin: Callable[..., Origin]
) -> None:
    target = f"{HOST_NAME}:{start_origin(say_ok).port}"
    proxied, neighbour = serve(target), serve(target)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"1,000 connections need more than the {hard} descriptors that a process may have here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    before = open_descriptors()
    request = f"GET http://{target}/ HTTP/1.1\r\n\r\n".encode()
    try:
        clients = [proxied.connect() for _ in range(1000)]
        wait_until(lambda: open_descriptors() >= before + 1000 + 128)
        assert open_descriptors() <= before + 1000 + 128 + 5, "the rest of them wait outside"
        assert neighbour.ask(request).endswith(b"ok")
        for client in clients:
            client.close()
        assert proxied.ask(request).endswith(b"ok")
        wait_until(lambda: open_descriptors() <= before + 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_gigabyte_goes_through_in_little_memory(start_origin: Callable[..., Origin]) -> None:
    size = 1024 * MIB

    def pour(connection: socket.socket) -> None:
        read_head(connection)
        block = bytes(MIB)
        for _ in range(size // MIB):
            connection.sendall(block)

    target = f"{HOST_NAME}:{start_origin(pour).port}"
    proxied = Proxied(the_egress(), [target])
    with proxied.tunnel(target) as client:
        client.sendall(b"\r\n\r\n")
        before = resident()
        buffer, received, most = bytearray(MIB), 0, 0
        while count := client.recv_into(buffer):
            received += count
            if received % (16 * MIB) < count:
                time.sleep(0.002)  # a reader who is slower than the writer
                most = max(most, resident())
    proxied.service.close()

    assert received == size
    assert most - before < 32 * MIB


def resident() -> int:
    """Bytes of memory of this process."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


# The log


def test_the_log_keeps_the_newest_and_counts_the_others() -> None:
    log = NetworkLog(limit=3)
    for number in range(5):
        log.refused("example.org", number, "no")

    assert [attempt.port for attempt in log.attempts()] == [2, 3, 4]
    assert log.dropped == 2


@pytest.mark.parametrize("text", ["\x1b[2J", "\\", "\0", "é", "a"])
def test_the_whole_log_is_printable_and_fits_into_what_a_keeper_may_say(text: str) -> None:
    log = NetworkLog()
    log.refused(text * 10_000, 65535, text * 10_000)
    (attempt,) = log.attempts()

    assert attempt.host.isascii()
    assert attempt.host.isprintable()
    assert 10_000 * (len(json.dumps(asdict(attempt))) + 2) < lines.LONGEST


# The process


def test_no_thread_and_no_asyncio_before_the_first_sandbox_needs_them() -> None:
    program = (
        "import sys, threading; from code_sandboxes.isolation.egress import the_egress; the_egress();"
        "print('asyncio' in sys.modules, threading.active_count())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert said.stdout.split() == ["False", "1"]


def test_a_forked_child_serves_for_itself_and_ends_nothing_of_its_parent(
    start_origin: Callable[..., Origin],
) -> None:
    target = f"{HOST_NAME}:{start_origin(say_ok).port}"
    request = f"GET http://{target}/ HTTP/1.1\r\n\r\n".encode()
    proxied = Proxied(the_egress(), [target])
    assert proxied.ask(request).endswith(b"ok")

    child = os.fork()
    if child == 0:
        is_served = Proxied(the_egress(), [target]).ask(request).endswith(b"ok")
        os._exit(0 if is_served else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert proxied.ask(request).endswith(b"ok")
    proxied.service.close()
