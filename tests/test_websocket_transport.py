"""The websocket to a kernel, against servers that do what the test wants."""

from __future__ import annotations

import contextlib
import http
import queue
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve, unix_serve

from code_sandboxes.protocol.kernel_websocket import SUBPROTOCOL, decode, encode
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.transports import websocket
from code_sandboxes.transports.errors import MessageTooLargeError
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.transports.websocket import WebSocketAddress, WebSocketTransport
from conftest import open_descriptors, wait_until
from tests.cutting_proxy import CuttingProxy
from tests.servers.server import free_port

MIB = 1024**2

PATIENCE = 20.0

PATH = "/api/kernels/1/channels?session_id=2"


def message(number: int, size: int = 0, channel: Channel = "shell") -> Message:
    return Message(channel, {"msg_id": str(number)}, buffers=[bytes(size)] if size else [])


class Peer:
    """A server of which the test has each connection in its hands."""

    def __init__(self, listen: Callable[..., Server] = serve, *place: Any, **settings: Any) -> None:
        self.requests: list[Request] = []
        self.answers: list[Response] = []
        """To the next openings, in their place."""
        self._connections: queue.Queue[ServerConnection] = queue.Queue()
        self._over = threading.Event()
        settings = {
            "subprotocols": [SUBPROTOCOL],
            "max_size": None,
            "ping_interval": None,
            "close_timeout": 1,
            "process_request": self._process,
        } | settings
        self._server = listen(self._handle, *(place or ("127.0.0.1", 0)), **settings)
        self._thread = threading.Thread(target=self._server.serve_forever, name="peer")
        self._thread.start()

    @property
    def address(self) -> WebSocketAddress:
        port = self._server.socket.getsockname()[1]
        return WebSocketAddress(f"ws://127.0.0.1:{port}{PATH}", {"Authorization": "token sesame"})

    def take(self) -> ServerConnection:
        """The next connection."""
        return self._connections.get(timeout=PATIENCE)

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()

    def _process(self, _: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else None

    def _handle(self, connection: ServerConnection) -> None:
        self._connections.put(connection)
        self._over.wait()


class Client:
    """A transport, and all that it has told."""

    def __init__(self, address: WebSocketAddress, max_message: int = 64 * MIB) -> None:
        self.received: list[Message] = []
        self.told: list[object] = []
        self.transport = WebSocketTransport(the_loop(), address, self.received.append, max_message)
        self.transport.cut = lambda is_away: self.told.append("away" if is_away else "back")
        self.transport.lost = lambda channel, how: self.told.append((channel, how))
        self.transport.broken = lambda why, status: self.told.append((why, status))
        the_loop().call_soon(self.transport.open)

    def ids(self) -> list[str]:
        return [each.msg_id for each in self.received]

    def wait_received(self, count: int) -> None:
        wait_until(lambda: len(self.received) >= count)

    def close(self) -> None:
        the_loop().call_soon(self.transport.close)


MakePeer = Callable[..., Peer]
MakeClient = Callable[..., Client]


@pytest.fixture
def make_peer() -> Iterator[MakePeer]:
    made: list[Peer] = []

    def make(*arguments: Any, **settings: Any) -> Peer:
        made.append(Peer(*arguments, **settings))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


@pytest.fixture
def make_client(make_peer: MakePeer) -> Iterator[MakeClient]:
    """They are closed before the servers are."""
    made: list[Client] = []

    def make(*arguments: Any, **settings: Any) -> Client:
        made.append(Client(*arguments, **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def peer(make_peer: MakePeer) -> Peer:
    return make_peer()


@pytest.fixture
def client(peer: Peer, make_client: MakeClient) -> Client:
    return make_client(peer.address)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is waited for by the clock takes a moment."""
    monkeypatch.setattr(websocket, "_PING_EVERY", 0.1)
    monkeypatch.setattr(websocket, "_SILENT_FOR", 0.3)
    monkeypatch.setattr(websocket, "_PATIENCE", 0.2)
    monkeypatch.setattr(websocket, "_DIAL", 0.2)
    monkeypatch.setattr(websocket, "_OPENING", 0.2)


def send(connection: ServerConnection, *messages: Message, is_v1: bool = True) -> None:
    for each in messages:
        connection.send(encode(each, is_v1=is_v1))


def take(connection: ServerConnection, is_v1: bool = True) -> Message:
    return decode(connection.recv(timeout=PATIENCE), is_v1=is_v1)


# What is said.


def test_messages_go_both_ways(peer: Peer, client: Client) -> None:
    client.transport.send(message(1, 3))
    connection = peer.take()
    assert connection.subprotocol == SUBPROTOCOL
    assert take(connection) == message(1, 3)
    send(connection, message(2, 3, "iopub"), message(3))
    client.wait_received(2)
    assert client.received[0] == message(2, 3, "iopub")
    assert client.ids() == ["2", "3"]


def test_the_token_is_in_a_header_and_not_in_the_url(peer: Peer, client: Client) -> None:
    peer.take()
    (request,) = peer.requests
    assert request.path == PATH
    assert request.headers["Authorization"] == "token sesame"
    assert "Cookie" not in request.headers
    assert "Sec-WebSocket-Extensions" not in request.headers  # what is compressed takes time, and memory
    assert "sesame" not in repr(peer.address)


def test_a_server_that_knows_only_the_older_frames_gets_those(
    make_peer: MakePeer, make_client: MakeClient
) -> None:
    peer = make_peer(subprotocols=None)
    client = make_client(peer.address)
    client.transport.send(message(1))
    client.transport.send(message(2, 3))
    connection = peer.take()
    assert connection.subprotocol is None
    text, data = connection.recv(timeout=PATIENCE), connection.recv(timeout=PATIENCE)
    assert isinstance(text, str)
    assert isinstance(data, bytes)
    assert [decode(each, is_v1=False).msg_id for each in (text, data)] == ["1", "2"]
    send(connection, message(3), message(4, 3), is_v1=False)
    client.wait_received(2)
    assert client.received == [Message("shell", {"msg_id": "3"}), message(4, 3)]


def test_what_is_sent_from_many_threads_comes_whole(peer: Peer, client: Client) -> None:
    connection = peer.take()

    def send_some(first: int) -> None:
        for number in range(first, 400, 4):
            client.transport.send(message(number))

    threads = [threading.Thread(target=send_some, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [int(take(connection).msg_id) for _ in range(400)]
    assert sorted(got) == list(range(400))
    assert all([n for n in got if n % 4 == first] == list(range(first, 400, 4)) for first in range(4))


@pytest.mark.parametrize("is_v1", [True, False])
def test_a_message_in_fragments_is_one_message(
    make_peer: MakePeer, make_client: MakeClient, is_v1: bool
) -> None:
    peer = make_peer(subprotocols=[SUBPROTOCOL] if is_v1 else None)
    client = make_client(peer.address)
    connection = peer.take()
    for each in (message(1), message(2, 1000)):
        frame = encode(each, is_v1=is_v1)
        connection.send([frame[start : start + 7] for start in range(0, len(frame), 7)])
        connection.ping()
    send(connection, message(3), is_v1=is_v1)
    client.wait_received(3)
    assert client.ids() == ["1", "2", "3"]
    assert client.received[1] == message(2, 1000)


@pytest.mark.slow
def test_large_frames_go_both_ways(peer: Peer, client: Client) -> None:
    connection = peer.take()
    client.transport.send(message(1, 7 * MIB))
    assert take(connection) == message(1, 7 * MIB)
    send(connection, message(2, 20 * MIB), message(3, 2 * MIB))
    client.wait_received(2)
    assert client.received == [message(2, 20 * MIB), message(3, 2 * MIB)]


def test_what_no_server_would_take_is_refused(peer: Peer, client: Client) -> None:
    connection = peer.take()
    for too_large in (message(1, 9 * MIB), Message("shell", {}, content={"code": "x" * 9 * MIB})):
        with pytest.raises(MessageTooLargeError, match="no more than 8 MiB"):
            client.transport.send(too_large)
    client.transport.send(message(2))
    assert take(connection).msg_id == "2"


def test_what_is_no_message_is_dropped(peer: Peer, client: Client) -> None:
    connection = peer.take()
    connection.send(b"")
    connection.send(b"\xff" * 100)
    connection.send("text")
    send(connection, message(1))
    client.wait_received(1)
    assert client.ids() == ["1"]
    assert client.transport.dropped == {"malformed": 3}


# That somebody is there.


def test_pings_are_answered_while_nobody_waits(peer: Peer, client: Client) -> None:
    connection = peer.take()
    for _ in range(3):
        assert connection.ping().wait(PATIENCE)


def test_something_is_sent_before_a_proxy_takes_the_connection_for_idle(
    peer: Peer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 3 * websocket._PING_EVERY <= 30
    monkeypatch.setattr(websocket, "_PING_EVERY", 0.05)
    with CuttingProxy(peer.address.url) as proxy:
        client = make_client(WebSocketAddress(proxy.url, {}))
        connection = peer.take()
        proxy.cut_idle(0.3)
        before = proxy.bytes_up
        wait_until(lambda: proxy.bytes_up > before + 6 * 6)  # pings of six bytes
        send(connection, message(1))
        client.wait_received(1)
        assert client.told == []


def test_silence_is_noticed_even_while_much_is_sent(
    peer: Peer, make_client: MakeClient, impatient: None
) -> None:
    with CuttingProxy(peer.address.url) as proxy:
        client = make_client(WebSocketAddress(proxy.url, {}))
        peer.take()
        proxy.stall()

        def has_noticed() -> bool:
            client.transport.send(message(1))
            return bool(client.told)

        wait_until(has_noticed)
        assert client.told[0] == "away"


@pytest.mark.slow
def test_a_server_that_takes_its_time_to_read_is_not_silent(
    make_peer: MakePeer, make_client: MakeClient, impatient: None
) -> None:
    peer = make_peer(max_queue=1)
    client = make_client(peer.address)
    connection = peer.take()
    for number in range(30):
        client.transport.send(message(number, MIB))
    for number in range(30):
        time.sleep(0.02)  # it is this slow
        assert take(connection).msg_id == str(number)
    assert client.told == []


# That it is lost.


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012])
def test_a_connection_that_ends_is_made_again(peer: Peer, client: Client, code: int) -> None:
    first = peer.take()
    send(first, message(1))
    client.wait_received(1)
    if code == 1006:
        first.socket.shutdown(socket.SHUT_RDWR)
    else:
        first.close(code, "why")
    second = peer.take()
    send(second, message(2))
    client.wait_received(2)
    assert client.told == ["away", "back"]
    assert [request.path for request in peer.requests] == [PATH, PATH]
    client.transport.send(message(3))
    assert take(second).msg_id == "3"


def test_all_that_came_before_the_end_is_received(peer: Peer, client: Client) -> None:
    connection = peer.take()
    send(connection, *(message(number, 10_000) for number in range(300)))
    connection.close()
    client.wait_received(300)
    assert client.ids() == [str(number) for number in range(300)]


def test_what_is_sent_while_it_is_away_is_sent_when_it_is_back(peer: Peer, client: Client) -> None:
    first = peer.take()
    peer.answers += [refusal(503)] * 2
    first.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: client.told == ["away"])
    for number in range(5):
        client.transport.send(message(number))
    second = peer.take()
    assert [take(second).msg_id for _ in range(5)] == ["0", "1", "2", "3", "4"]
    wait_until(lambda: client.told == ["away", "back"])


def test_what_is_sent_when_it_is_back_comes_after_what_was_sent_before(peer: Peer, client: Client) -> None:
    def told(is_away: bool) -> None:
        client.transport.send(message(1 if is_away else 3))

    client.transport.cut = told
    peer.take().socket.shutdown(socket.SHUT_RDWR)
    client.transport.send(message(2))
    second = peer.take()
    got = [take(second).msg_id for _ in range(2)]
    assert got[0] == "1"
    assert got[-1] in ("2", "3")  # the second may have been lost with the first connection


def refusal(status: int) -> Response:
    return Response(status, http.HTTPStatus(status).phrase, Headers({"Content-Length": "0"}))


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_that_stays_one_ends_it_at_once(peer: Peer, make_client: MakeClient, status: int) -> None:
    peer.answers += [refusal(status)]
    client = make_client(peer.address)
    wait_until(lambda: client.told)
    assert client.told == [(f"the server answered with the HTTP status {status}", status)]
    assert len(peer.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_refusal_that_may_pass_is_waited_for(peer: Peer, make_client: MakeClient, status: int) -> None:
    peer.answers += [refusal(status)] * 2
    client = make_client(peer.address)
    client.transport.send(message(1))
    assert take(peer.take()).msg_id == "1"
    assert len(peer.requests) == 3
    assert client.told == []


def test_a_refusal_that_does_not_pass_is_told(peer: Peer, make_client: MakeClient, impatient: None) -> None:
    peer.answers += [refusal(503)] * 1000
    client = make_client(peer.address)
    wait_until(lambda: client.told)
    assert client.told == [("the server answered with the HTTP status 503", None)]


def test_nobody_there_is_told(make_client: MakeClient, impatient: None) -> None:
    client = make_client(WebSocketAddress(f"ws://127.0.0.1:{free_port()}{PATH}", {}))
    wait_until(lambda: client.told)
    assert client.told == [("ConnectionRefusedError: [Errno 111] Connection refused", None)]


@pytest.mark.parametrize(
    "said", [b"", b"\x16\x03\x01 no http", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"x" * 100_000]
)
def test_who_speaks_no_websocket_is_told(make_client: MakeClient, impatient: None, said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        client = make_client(WebSocketAddress(f"ws://127.0.0.1:{listener.getsockname()[1]}{PATH}", {}))
        give_up = time.monotonic() + PATIENCE
        while not client.told and time.monotonic() < give_up:
            with contextlib.suppress(TimeoutError, ConnectionError), listener.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(said)
    assert [type(each) for each in client.told] == [tuple]


def test_who_says_nothing_is_told(make_client: MakeClient, impatient: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = make_client(WebSocketAddress(f"ws://127.0.0.1:{listener.getsockname()[1]}{PATH}", {}))
        wait_until(lambda: client.told)
    assert client.told == [("the server did not answer in time", None)]


def test_a_message_that_is_too_large_is_skipped(peer: Peer, make_client: MakeClient) -> None:
    client = make_client(peer.address, max_message=MIB)
    first = peer.take()
    send(first, message(1))
    with contextlib.suppress(ConnectionClosed):
        send(first, message(2, 3 * MIB))
    second = peer.take()
    send(second, message(3, MIB // 2))
    client.wait_received(2)
    assert client.ids() == ["1", "3"]
    how = "larger than 1 MiB"
    assert client.told == ["away", ("iopub", how), ("shell", how), "back"]
    assert client.transport.dropped == {"too large": 1}


def test_what_came_with_a_message_that_is_too_large_is_received(peer: Peer, make_client: MakeClient) -> None:
    client = make_client(peer.address, max_message=MIB)
    connection = peer.take()
    frames = [encode(message(number), is_v1=True) for number in range(50)]
    protocol = connection.protocol
    for frame in frames:
        assert isinstance(frame, bytes)
        protocol.send_binary(frame)
    protocol.send_binary(bytes(3 * MIB))
    with contextlib.suppress(OSError):
        connection.socket.sendall(b"".join(protocol.data_to_send()))  # in one go
    wait_until(lambda: "back" in client.told)
    assert client.ids() == [str(number) for number in range(50)]


# Nobody waits for another.


@pytest.mark.slow
def test_a_server_that_does_not_read_keeps_nobody_waiting(
    make_peer: MakePeer, make_client: MakeClient
) -> None:
    slow, quick = make_peer(max_queue=1), make_peer()
    stuck, other = make_client(slow.address), make_client(quick.address)
    connection = slow.take()
    for number in range(60):
        stuck.transport.send(message(number, MIB))
    answering = quick.take()
    for number in range(20):
        other.transport.send(message(number))
        send(answering, take(answering))
        other.wait_received(number + 1)
    assert [take(connection).msg_id for _ in range(60)] == [str(number) for number in range(60)]


@pytest.mark.slow
def test_a_server_that_sends_without_end_keeps_nobody_waiting(
    make_peer: MakePeer, make_client: MakeClient
) -> None:
    loud, quick = make_peer(), make_peer()
    flooded, other = make_client(loud.address), make_client(quick.address)
    connection = loud.take()
    is_over = threading.Event()

    def flood() -> None:
        while not is_over.is_set():
            send(connection, message(1, 1000))

    thread = threading.Thread(target=flood)
    thread.start()
    answering = quick.take()
    flooded.wait_received(100)
    for number in range(20):
        other.transport.send(message(number))
        send(answering, take(answering))
        other.wait_received(number + 1)
    is_over.set()
    thread.join()
    assert flooded.told == []


# The end.


def test_the_server_is_told_of_the_end(peer: Peer, client: Client) -> None:
    connection = peer.take()
    send(connection, message(0))
    client.wait_received(1)
    client.close()
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(timeout=PATIENCE)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1000
    client.transport.send(message(1))  # which goes nowhere
    assert client.told == []


def test_nothing_is_left_of_what_is_closed_at_any_time(peer: Peer, make_client: MakeClient) -> None:
    the_loop()
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    clients = []
    for number in range(20):
        client = make_client(peer.address)
        if number % 2:
            peer.take()
        client.close()
        clients.append(client)
    are_closed = threading.Event()
    the_loop().call_soon(are_closed.set)
    assert are_closed.wait(PATIENCE)
    wait_until(lambda: not [each for each in set(threading.enumerate()) - threads if "apart" in each.name])
    peer.close()
    wait_until(lambda: open_descriptors() <= descriptors)
    assert all(client.told == [] for client in clients)


# Other ways there.


def test_messages_go_through_a_unix_socket(
    make_peer: MakePeer, make_client: MakeClient, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    peer = make_peer(unix_serve, path)
    client = make_client(WebSocketAddress(f"ws://localhost{PATH}", {}, unix_socket=path))
    connection = peer.take()
    client.transport.send(message(1, MIB))
    assert take(connection) == message(1, MIB)
    send(connection, message(2, MIB))
    client.wait_received(1)
    assert client.received == [message(2, MIB)]
    connection.socket.shutdown(socket.SHUT_RDWR)
    send(peer.take(), message(3))
    client.wait_received(2)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, and signed by itself; the key is in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("NO OPENSSL: there is no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("certificate") / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    alternative = "subjectAltName=IP:127.0.0.1"
    made = subprocess.run(
        [*command.split(), "-addext", alternative, "-keyout", f"{path}.key", "-out", path],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    path.write_bytes(path.read_bytes() + Path(f"{path}.key").read_bytes())
    return path


@pytest.fixture
def secure_peer(make_peer: MakePeer, certificate: Path) -> Peer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return make_peer(ssl=context)


def secured(address: WebSocketAddress, tls: ssl.SSLContext) -> WebSocketAddress:
    return WebSocketAddress(address.url.replace("ws://", "wss://"), address.headers, tls=tls)


@pytest.mark.slow
def test_messages_go_through_tls(secure_peer: Peer, make_client: MakeClient, certificate: Path) -> None:
    tls = ssl.create_default_context(cafile=str(certificate))
    client = make_client(secured(secure_peer.address, tls))
    connection = secure_peer.take()
    client.transport.send(message(1, 7 * MIB))
    assert take(connection) == message(1, 7 * MIB)
    # What has been decrypted and not been read is not seen by who waits for the socket.
    send(connection, *(message(number, size) for number in range(200) for size in (1, 20_000)))
    send(connection, message(1000, 20 * MIB))
    client.wait_received(401)
    assert client.ids() == [*(str(number // 2) for number in range(400)), "1000"]
    connection.close(1001)
    send(secure_peer.take(), message(1001))
    client.wait_received(402)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    secure_peer: Peer, make_client: MakeClient, impatient: None
) -> None:
    client = make_client(secured(secure_peer.address, ssl.create_default_context()))
    wait_until(lambda: client.told)
    assert len(client.told) == 1
    assert "certificate verify failed" in str(client.told)
    assert secure_peer.requests == []


def test_a_certificate_of_another_host_is_refused(
    secure_peer: Peer, make_client: MakeClient, certificate: Path, impatient: None
) -> None:
    tls = ssl.create_default_context(cafile=str(certificate))
    address = secured(secure_peer.address, tls)
    client = make_client(WebSocketAddress(address.url.replace("127.0.0.1", "localhost"), {}, tls=tls))
    wait_until(lambda: client.told)
    assert "certificate verify failed" in str(client.told)
    assert secure_peer.requests == []
