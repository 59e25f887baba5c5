"""The forwarder that spoils connections: what it does to a client and to a server that sends all back."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from conftest import wait_until
from tests.cutting_proxy import CuttingProxy, Ending


class Echo(socketserver.ThreadingTCPServer):
    """Sends back what it is sent, and knows how the connections ended."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.echoed = 0
        self.endings: list[str] = []
        super().__init__(("127.0.0.1", 0), EchoOne)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/base"


class EchoOne(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Echo)
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
                self.server.echoed += len(data)
            self.server.endings.append("end")
        except ConnectionError:
            self.server.endings.append("reset")


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[CuttingProxy]:
    with CuttingProxy(echo.url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: CuttingProxy) -> Iterator[socket.socket]:
    """Connected, and known to be."""
    with connected(proxy) as client:
        yield client


@contextlib.contextmanager
def connected(proxy: CuttingProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        client.sendall(b"hello")
        assert received(client, 5) == b"hello"
        yield client


def received(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        taken = client.recv(size - len(data))
        assert taken, f"the connection ended after {len(data)} of {size} bytes"
        data += taken
    return bytes(data)


def has_nothing(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        client.recv(1)
        return False
    except BlockingIOError:
        return True
    finally:
        client.settimeout(30)


def test_proxy_takes_the_place_of_the_server_in_its_address(proxy: CuttingProxy) -> None:
    assert proxy.url == f"http://127.0.0.1:{proxy.port}/base"


def test_everything_is_carried_and_counted(proxy: CuttingProxy, client: socket.socket) -> None:
    data = bytes(range(256)) * 20_000
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert received(client, len(data)) == data
    sender.join()
    wait_until(lambda: (proxy.bytes_up, proxy.bytes_down) == (len(data) + 5, len(data) + 5))
    assert (proxy.connections, proxy.open_connections) == (1, 1)


def test_end_of_one_side_is_carried_and_the_other_may_go_on(
    echo: Echo, proxy: CuttingProxy, client: socket.socket
) -> None:
    client.sendall(b"the last")
    client.shutdown(socket.SHUT_WR)
    assert received(client, 8) == b"the last"
    assert client.recv(1) == b""
    wait_until(lambda: echo.endings == ["end"] and proxy.open_connections == 0)


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_cut_is_seen_by_both_sides(
    ending: Ending, echo: Echo, proxy: CuttingProxy, client: socket.socket
) -> None:
    assert proxy.cut(ending) == 1
    if ending == "reset":
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        assert client.recv(1) == b""
    wait_until(lambda: echo.endings == [ending])
    with connected(proxy):
        assert (proxy.connections, proxy.open_connections) == (2, 1)


def test_cut_by_an_end_is_one_even_if_there_is_something_to_read(
    echo: Echo, proxy: CuttingProxy, client: socket.socket
) -> None:
    proxy.stall()
    client.sendall(b"never seen")
    proxy.cut("end")
    assert client.recv(1) == b""


def test_stall_towards_the_client_holds_what_the_server_says(
    echo: Echo, proxy: CuttingProxy, client: socket.socket
) -> None:
    proxy.stall("down")
    client.sendall(b"held")
    wait_until(lambda: echo.echoed == 9 and proxy.bytes_up == 9)
    assert has_nothing(client)
    assert proxy.bytes_down == 5
    proxy.resume()
    assert received(client, 4) == b"held"


def test_stall_towards_the_server_holds_even_an_end(
    echo: Echo, proxy: CuttingProxy, client: socket.socket
) -> None:
    proxy.stall("up")
    client.sendall(b"held")
    client.close()
    with socket.create_connection(("127.0.0.1", proxy.port)):
        wait_until(lambda: proxy.open_connections == 2)  # so the first has had its turn
        assert (echo.echoed, echo.endings) == (5, [])
        proxy.resume()
        wait_until(lambda: echo.echoed == 9)


@pytest.mark.slow
def test_idle_connections_are_cut_and_no_others(
    echo: Echo, proxy: CuttingProxy, client: socket.socket
) -> None:
    proxy.cut_idle(1.0)
    with connected(proxy) as busy:
        while proxy.open_connections == 2:
            busy.sendall(b"x")
            assert received(busy, 1) == b"x"
        proxy.cut_idle(None)
        assert client.recv(1) == b""
        busy.sendall(b"y")
        assert received(busy, 1) == b"y"


def test_refused_connections_are_refused_and_the_others_go_on(
    proxy: CuttingProxy, client: socket.socket
) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    client.sendall(b"still here")
    assert received(client, 10) == b"still here"
    proxy.accept()
    with connected(proxy):
        assert proxy.open_connections == 2


def test_connection_to_a_server_that_is_not_there_is_reset(proxy: CuttingProxy, echo: Echo) -> None:
    echo.shutdown()
    echo.server_close()
    with (
        pytest.raises(ConnectionResetError),  # by the one or the other: it may come at once
        socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client,
    ):
        client.recv(1)


def test_nothing_listens_or_is_connected_after_close(echo: Echo) -> None:
    with CuttingProxy(echo.url) as proxy, connected(proxy) as client:
        proxy.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port))
