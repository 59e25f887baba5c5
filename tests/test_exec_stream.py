"""What an engine's attached stream is read as: a socket's bytes, whatever pieces the frames come in."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import cast

import pytest

from code_sandboxes.isolation.engine_address import EngineAddress
from code_sandboxes.remote.exec_stream import ExecStream, dial_socket


def frame(data: bytes, stream: int = 1) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


@pytest.fixture
def ends() -> Iterator[tuple[ExecStream, socket.socket]]:
    ours, its = socket.socketpair()
    stream = ExecStream(ours)
    yield stream, its
    stream.close()
    its.close()


def everything(stream: ExecStream, size: int = 65536) -> bytes:
    parts = []
    while part := stream.recv(size):
        assert len(part) <= size
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("size", [1, 3, 8, 9, 65536])
def test_what_is_read_has_no_headers_in_it_however_much_is_read_at_once(
    ends: tuple[ExecStream, socket.socket], size: int
) -> None:
    stream, its = ends
    its.sendall(frame(b"one") + frame(b"") + frame(b"hidden", 2) + frame(b"two" * 100) + frame(b"!"))
    its.shutdown(socket.SHUT_WR)
    assert everything(stream, size) == b"one" + b"two" * 100 + b"!"
    assert stream.said == b"hidden"


def test_a_header_that_comes_in_pieces_is_waited_for(ends: tuple[ExecStream, socket.socket]) -> None:
    stream, its = ends
    stream.setblocking(False)
    for byte in frame(b"x")[:-1]:
        its.sendall(bytes([byte]))
        with pytest.raises(BlockingIOError):
            stream.recv(100)
    its.sendall(b"x")
    assert stream.recv(100) == b"x"
    with pytest.raises(BlockingIOError):
        stream.recv(100)


def test_nothing_is_kept_of_which_the_system_does_not_know(ends: tuple[ExecStream, socket.socket]) -> None:
    stream, its = ends
    its.sendall(frame(b"a" * 50) + frame(b"b" * 50))
    assert stream.recv(60) == b"a" * 50  # and two bytes of the next header
    assert stream.recv(10) == b"b" * 4
    assert stream.recv(1000) == b"b" * 46
    assert stream.pending() == 0


def test_it_has_the_time_outs_of_a_socket(ends: tuple[ExecStream, socket.socket]) -> None:
    stream, its = ends
    stream.settimeout(0.01)
    assert stream.gettimeout() == 0.01
    its.sendall(frame(b"said", 2))
    with pytest.raises(TimeoutError):
        stream.recv(10)
    assert stream.said == b"said"


def test_an_http_client_reads_an_answer_that_ends_with_the_connection(
    ends: tuple[ExecStream, socket.socket],
) -> None:
    stream, its = ends
    client = HTTPConnection("sandbox")
    client.sock = cast("socket.socket", stream)
    client.request("GET", "/")
    assert its.recv(65536).startswith(b"GET / HTTP/1.1\r\n")
    its.sendall(frame(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n") + frame(b"first"))
    answer = client.getresponse()  # which closes the client's side
    its.sendall(frame(b" and last"))
    its.shutdown(socket.SHUT_WR)
    assert answer.read() == b"first and last"
    answer.close()
    assert stream.fileno() == -1


# The engine's answers


class Engine:
    """Says what it is told to, one piece for each request."""

    def __init__(self, folder: Path, *answers: bytes) -> None:
        self.heard: list[bytes] = []
        path = folder / "engine"
        self.address = EngineAddress(f"unix://{path}", "1.41")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, args=(answers,), daemon=True).start()

    def _serve(self, answers: tuple[bytes, ...]) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            for answer in answers:
                heard = b""
                while not heard.endswith(b"}"):
                    heard += connection.recv(65536)
                self.heard.append(heard)
                connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)


def answer(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


MADE = answer(201, b'{"Id": "abc"}')


def test_what_comes_behind_the_head_of_an_answer_is_the_streams(tmp_path: Path) -> None:
    engine = Engine(tmp_path, MADE, b"HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\n\r\n" + frame(b"\x06hello"))
    stream = dial_socket(engine.address, "box", "/there")
    assert stream.recv(100) == b"hello"
    stream.close()
    made, started = engine.heard
    assert made.startswith(b"POST /v1.41/containers/box/exec HTTP/1.1\r\n")
    assert b'"/there"], "User": "0:0"' in made
    assert started.startswith(b"POST /v1.41/exec/abc/start HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([answer(404, b'{"message": "No such container: box"}')], "404: No such container: box"),
        ([answer(200, b"nonsense")], "makes no sense"),
        ([MADE, answer(409, b'{"message": "it is paused"}')], "it is paused"),
        ([MADE, b"HTTP/1.1 101 X\r\n\r\n" + frame(b"no python3", 2)], "lets nobody in: no python3"),
    ],
)
def test_why_nobody_can_be_reached_is_told(tmp_path: Path, answers: list[bytes], sentence: str) -> None:
    engine = Engine(tmp_path, *answers)
    with pytest.raises(OSError, match=sentence):
        dial_socket(engine.address, "box", "/there")


# The way over ssh


def test_over_ssh_it_is_the_command_and_ends_with_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ssh"
    program.write_text(f'#!/bin/sh\necho "$@" $$ > {tmp_path}/called\nexec cat\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    connection = EngineAddress("ssh://me@far:2222", "1.41").dial()
    connection.sendall(b"hello")
    assert connection.recv(100) == b"hello"
    *arguments, pid = (tmp_path / "called").read_text().split()
    assert " ".join(arguments).endswith("-l me -p 2222 -- far docker system dial-stdio")
    connection.close()
    assert not Path(f"/proc/{pid}").exists()
