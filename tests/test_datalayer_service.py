"""The service that stands in for the Datalayer cloud does what is known of the cloud, and nothing worse."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from conftest import wait_until
from tests.datalayer_service import CreateFault, DatalayerService, Environment, Knobs, Runtime, kernel_code
from tests.datalayer_service.answers import Refusal
from tests.datalayer_service.frames import close_frame, read_frame
from tests.datalayer_service.ledger import Ledger

IAM = "/api/iam/v1"
RUNTIMES = "/api/runtimes/v1"

BODY_A: dict[str, object] = {"environment_name": "python-cpu-env", "credits_limit": 1}
BODY_B: dict[str, object] = {
    "environment": {"name": "python-cpu-env"},
    "credits_limit": 1,
    "type": "notebook",
}


class Client:
    """Asks with the account's key; redirects are not followed, and nothing is tried again."""

    def __init__(self, service: DatalayerService) -> None:
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {service.api_key}"
        self._url = service.url

    def ask(self, method: str, path: str, body: object = None, **more: Any) -> requests.Response:
        url = path if path.startswith("http") else f"{self._url}{path}"
        return self.session.request(method, url, json=body, allow_redirects=False, timeout=60, **more)

    def create(self, **body: object) -> dict[str, Any]:
        answer = self.ask("POST", f"{RUNTIMES}/runtimes", BODY_B | body)
        assert answer.status_code == 201, answer.text
        runtime: dict[str, Any] = answer.json()["runtime"]
        return runtime


@pytest.fixture
def service() -> Iterator[DatalayerService]:
    with DatalayerService() as service:
        yield service


@pytest.fixture
def client(service: DatalayerService) -> Iterator[Client]:
    client = Client(service)
    yield client
    client.session.close()


@pytest.fixture
def runtime(service: DatalayerService, client: Client) -> Runtime:
    return service.runtime(client.create()["runtime_name"])


# The control plane, without runtimes


@pytest.mark.parametrize("path", [f"{IAM}/ping", f"{RUNTIMES}/ping"])
def test_anybody_may_ping(service: DatalayerService, path: str) -> None:
    assert requests.get(f"{service.url}{path}", timeout=60).json()["success"] is True


@pytest.mark.parametrize("path", [f"{IAM}/whoami", f"{RUNTIMES}/runtimes", "/api/elsewhere"])
@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "token {key}"])
def test_all_else_wants_the_key_as_bearer(service: DatalayerService, path: str, authorization: str) -> None:
    headers = {"Authorization": authorization.format(key=service.api_key)}
    answer = requests.get(f"{service.url}{path}", headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["success"]) == (401, False)


def test_it_knows_whose_key_it_is(client: Client) -> None:
    assert client.ask("GET", f"{IAM}/whoami").json()["profile"]["handle_s"] == "ada"


def test_credits_can_be_said_in_several_ways(service: DatalayerService, client: Client) -> None:
    assert client.ask("GET", f"{IAM}/usage/credits").json()["credits"]["credits"] == 100.0
    service.knobs.credits_quota, service.knobs.credits_field = 250.0, "remaining"
    told = client.ask("GET", f"{IAM}/usage/credits").json()
    assert told["reservations"] == []
    assert {key: told["credits"][key] for key in ("credits", "quota", "remaining")} == {
        "credits": 150.0,
        "quota": 250.0,
        "remaining": 100.0,
    }


def test_secrets_are_unique_and_their_values_are_not_told(client: Client) -> None:
    value = base64.b64encode(b"xyzzy").decode()
    secret = {"name": "KEY", "description": "", "variant": "key", "value": value}
    added = client.ask("POST", f"{IAM}/secrets", secret)
    assert added.status_code == 201
    assert client.ask("POST", f"{IAM}/secrets", secret).status_code == 409
    assert client.ask("POST", f"{IAM}/secrets", secret | {"value": "?"}).status_code == 422
    told = client.ask("GET", f"{IAM}/secrets")
    assert [secret["name_s"] for secret in told.json()["secrets"]] == ["KEY"]
    assert "xyzzy" not in told.text
    path = f"{IAM}/secrets/{added.json()['secret']['uid']}"
    assert client.ask("DELETE", path).status_code == 200
    assert client.ask("DELETE", path).status_code == 404


def test_environments_come_at_once_or_in_pages(service: DatalayerService, client: Client) -> None:
    path = f"{RUNTIMES}/environments"
    whole = client.ask("GET", path).json()
    assert "nextCursor" not in whole
    rates = {environment["name"]: environment["burning_rate"] for environment in whole["environments"]}
    assert rates["python-cpu-env"] == 0.008
    (gpu,) = (e["name"] for e in whole["environments"] if "nvidia.com/gpu" in e["resources"])
    assert gpu == "python-gpu-env"
    service.knobs.page_size = 2
    first = client.ask("GET", path, params={"limit": "50"}).json()
    second = client.ask("GET", path, params={"cursor": first["nextCursor"]}).json()
    assert first["environments"] + second["environments"] == whole["environments"]
    assert "nextCursor" not in second


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"environment": None}, 422),
        ({"credits_limit": -1}, 422),
        ({"credits_limit": 0}, 422),
        ({"credits_limit": None}, 422),
        ({"environment": {"name": "nowhere-env"}}, 404),
        ({"from": "01UNKNOWN"}, 404),
        ({"credits_limit": 101}, 402),
    ],
)
def test_creation_is_refused(client: Client, change: dict[str, object], status: int) -> None:
    answer = client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B | change)
    assert answer.status_code == status
    if status == 422:
        assert {"loc", "msg", "type"} == set(answer.json()["detail"][0])


@pytest.mark.parametrize(
    ("bodies", "a", "b"), [("AB", 404, 404), ("A", 404, 422), ("B", 422, 404)], ids=["AB", "A", "B"]
)
def test_a_body_is_understood_if_its_generation_is(
    service: DatalayerService, client: Client, bodies: Any, a: int, b: int
) -> None:
    service.knobs.bodies = bodies
    service.knobs.environments.clear()  # what is understood ends there
    assert client.ask("POST", f"{RUNTIMES}/runtimes", BODY_A).status_code == a
    assert client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B).status_code == b


def test_unknown_keys_can_be_refused(service: DatalayerService, client: Client) -> None:
    service.knobs.quota = 0  # so that nothing is created
    assert client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B | {"gpu": "T4"}).status_code == 403
    service.knobs.rejects_unknown_keys = True
    assert client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B | {"gpu": "T4"}).status_code == 422
    assert client.ask("POST", f"{RUNTIMES}/runtimes", BODY_A).status_code == 403
    service.knobs.bodies = "B"
    assert client.ask("POST", f"{RUNTIMES}/runtimes", BODY_A | BODY_B).status_code == 422


def test_creation_fails_once_or_always(service: DatalayerService, client: Client) -> None:
    def create() -> requests.Response:
        return client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B)

    service.knobs.create_fault = CreateFault.NO_CAPACITY
    service.knobs.next_creates = [CreateFault.BAD_GATEWAY, CreateFault.FAILED_WITH_200]
    gateway, failed = create(), create()
    assert (gateway.status_code, gateway.headers["Content-Type"]) == (502, "text/html")
    assert failed.status_code == 200
    assert failed.json() == {
        "success": False,
        "message": "No runtime available",
        "reason": "no_runtime_available",
        "retry_after_seconds": 5,
    }
    assert [create().status_code for _ in range(2)] == [503, 503]
    assert (service.runtimes, service.ledger.entries) == ([], [])


@pytest.mark.parametrize("status", [403, 429, 200])
def test_the_quota_is_told_by_a_status_or_by_a_reason(
    service: DatalayerService, client: Client, status: int
) -> None:
    service.knobs.quota, service.knobs.quota_status = 0, status
    answer = client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B)
    assert answer.status_code == status
    assert (answer.json()["success"], answer.json()["reason"]) == (False, "quota_exceeded")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_an_unknown_runtime_is_not_found(client: Client, method: str) -> None:
    assert client.ask(method, f"{RUNTIMES}/runtimes/runtime-0", {}).status_code == 404


@pytest.mark.parametrize("shape", ["envelope", "detail", "detail_message", "registry", "html"])
def test_errors_have_many_shapes(service: DatalayerService, client: Client, shape: Any) -> None:
    service.knobs.error_shape = shape
    answer = client.ask("GET", f"{RUNTIMES}/runtimes/runtime-0")
    assert answer.status_code == 404
    found = "404 Not Found" if shape == "html" else "Runtime runtime-0 not found"
    assert found in answer.text


def test_a_gateway_fails_now_and_then(service: DatalayerService, client: Client) -> None:
    service.knobs.bad_gateways = 1
    assert [client.ask("GET", f"{RUNTIMES}/runtimes").status_code for _ in range(2)] == [502, 200]


def test_a_path_of_snapshots_can_be_unknown(service: DatalayerService, client: Client) -> None:
    assert client.ask("GET", f"{RUNTIMES}/runtime-snapshots").json()["snapshots"] == []
    service.knobs.snapshot_paths = ("sandbox-snapshots",)
    assert client.ask("GET", f"{RUNTIMES}/runtime-snapshots").status_code == 404
    assert client.ask("GET", f"{RUNTIMES}/sandbox-snapshots").status_code == 200


def test_what_was_asked_is_recorded_and_logged_as_it_was(service: DatalayerService, client: Client) -> None:
    client.ask("POST", f"{RUNTIMES}/runtimes?token=leaked", {"credits_limit": 1})
    (record,) = service.requests
    assert (record.method, record.path, record.query) == ("POST", f"{RUNTIMES}/runtimes", "token=leaked")
    assert (record.status, record.scheme, record.body) == (422, "Bearer", {"credits_limit": 1})
    assert f'"POST {service.url}{RUNTIMES}/runtimes?token=leaked HTTP/1.1" 422' in service.log
    assert service.api_key not in service.log


def test_the_ingress_of_no_runtime_is_not_found(client: Client) -> None:
    answer = client.ask("GET", "/jupyter/server/python-cpu-pool/runtime-0/api")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "text/html")


def test_no_thread_is_left_of_a_service_with_a_client_that_stays() -> None:
    before = threading.enumerate()
    with DatalayerService() as service, requests.Session() as session:
        session.get(f"{service.url}{IAM}/ping", timeout=60)
        service.close()
        assert threading.enumerate() == before


# Parts


def test_what_was_not_burnt_is_refunded() -> None:
    ledger = Ledger(Knobs(credits=10, clock_speed=100.0))
    reservation = ledger.reserve(6, burning_rate=0.01)
    assert ledger.available == 4
    with pytest.raises(Refusal, match="5 asked, 4 available"):
        ledger.reserve(5, burning_rate=0.01)
    ledger.refund(reservation, started_at=time.time() - 2)
    assert ledger.available == pytest.approx(8, abs=0.1)
    assert [entry.kind for entry in ledger.entries] == ["reserve", "refund"]


@pytest.mark.parametrize("length", [0, 125, 126, 65535, 65536])
@pytest.mark.parametrize("is_masked", [False, True])
def test_frames_are_read_whole(length: int, is_masked: bool) -> None:
    mask = b"mask" if is_masked else b""
    bit = 0x80 if is_masked else 0
    if length < 126:
        head = bytes([0x82, bit | length])
    elif length < 65536:
        head = bytes([0x82, bit | 126]) + length.to_bytes(2, "big")
    else:
        head = bytes([0x82, bit | 127]) + length.to_bytes(8, "big")
    raw = head + mask + b"x" * length
    stream = io.BytesIO(raw + close_frame(1001))
    frames = [read_frame(stream), read_frame(stream), read_frame(stream)]
    assert [frame and frame.raw for frame in frames] == [raw, b"\x88\x02\x03\xe9", None]
    assert [frame and frame.is_message for frame in frames] == [True, False, None]
    assert read_frame(io.BytesIO(raw[:-1])) is None


@pytest.mark.parametrize(
    ("splits_at_nul", "broken"), [(True, {"unlucky"}), (False, set())], ids=["fragile", "robust"]
)
def test_variables_are_dumped_and_loaded(tmp_path: Path, splits_at_nul: bool, broken: set[str]) -> None:
    path = str(tmp_path / "variables")
    namespace: dict[str, object] = {"x": 41, "unlucky": 2560, "lines": "a\nb", "lock": threading.Lock()}
    left_out: dict[str, object] = {"_private": 1, "os": os, "f": lambda: 1, "C": Knobs, "len": len, "In": []}
    skipped = kernel_code.dump(namespace | left_out, path)
    assert json.loads(skipped) == {"lock": "TypeError"}
    loaded: dict[str, object] = {"x": 1, "y": 2}
    kernel_code.load(loaded, path, splits_at_nul)
    assert broken == {"x", "unlucky", "lines"} - loaded.keys()
    assert (loaded["x"], loaded["y"], loaded["lines"]) == (41, 2, "a\nb")


# With runtimes


def jupyter(runtime: Runtime, service: DatalayerService, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"token {runtime.token}"} | more.pop("headers", {})
    url = f"{service.url}{runtime.pod.base_url}{path}"
    return requests.request(method, url, headers=headers, timeout=60, **more)


def open_websocket(
    service: DatalayerService, runtime: Runtime, kernel: str | None = None, session: str = "", **more: Any
) -> ClientConnection:
    url = f"{service.url.replace('http', 'ws')}{runtime.pod.base_url}"
    websocket: ClientConnection = connect(
        f"{url}/api/kernels/{kernel or runtime.kernel_id}/channels?session_id={session or uuid.uuid4().hex}",
        additional_headers={"Authorization": f"token {runtime.token}"},
        max_size=None,
        proxy=None,
        **more,
    )
    return websocket


def send(websocket: ClientConnection, code: str) -> str:
    number = uuid.uuid4().hex
    header = {"msg_id": number, "session": number, "msg_type": "execute_request", "version": "5.3"}
    message = {
        "header": header | {"username": "", "date": ""},
        "parent_header": {},
        "metadata": {},
        "content": {"code": code, "silent": False, "user_expressions": {}, "allow_stdin": False},
        "channel": "shell",
    }
    websocket.send(json.dumps(message))
    return number


def receive(websocket: ClientConnection, number: str) -> list[dict[str, Any]]:
    """All messages for it, until its reply and its idle status have both come."""
    found: list[dict[str, Any]] = []
    missing = {"execute_reply", "idle"}
    while missing:
        message = json.loads(websocket.recv(60))
        if message["parent_header"].get("msg_id") == number:
            found.append(message)
            missing -= {message["msg_type"], message["content"].get("execution_state")}
    return found


def printed(messages: list[dict[str, Any]]) -> str:
    return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")


def run(service: DatalayerService, runtime: Runtime, code: str, kernel: str | None = None) -> str:
    with open_websocket(service, runtime, kernel) as websocket:
        return printed(receive(websocket, send(websocket, code)))


def close_code(websocket: ClientConnection) -> int:
    while True:
        try:
            websocket.recv(60)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 1006


@pytest.mark.slow
def test_a_runtime_from_its_creation_to_its_end(service: DatalayerService, client: Client) -> None:
    told = client.create(given_name="mine")
    (runtime,) = service.runtimes
    assert told["pod_name"] == told["runtime_name"] == runtime.name
    assert told["environment_name"] == told["environment"]["name"] == "python-cpu-env"
    assert (told["given_name"], told["type"], told["burning_rate"]) == ("mine", "notebook", 0.008)
    assert told["ingress"] == f"{service.url}/jupyter/server/python-cpu-pool/{runtime.name}"
    assert float(told["expired_at"]) - float(told["started_at"]) == pytest.approx(1 / 0.008)
    (reservation,) = client.ask("GET", f"{IAM}/usage/credits").json()["reservations"]
    assert (reservation["id"], reservation["credits"]) == (told["reservation_id"], 1)

    path = f"{RUNTIMES}/runtimes/{runtime.name}"
    assert client.ask("GET", path).json()["runtime"] == told
    assert client.ask("GET", f"{RUNTIMES}/runtimes").json()["runtimes"] == [told]
    assert client.ask("GET", f"{RUNTIMES}/runtimes/{runtime.uid}").status_code == 404
    assert client.ask("PUT", path, {"capabilities": ["x"]}).json()["runtime"]["capabilities"] == ["x"]

    assert jupyter(runtime, service, "GET", "/api").json()["version"]
    (kernel,) = jupyter(runtime, service, "GET", "/api/kernels").json()
    assert (kernel["id"], kernel["connections"]) == (runtime.kernel_id, 0)
    assert run(service, runtime, "print(6 * 7)") == "42\n"
    assert runtime.token not in " ".join(psutil.Process(runtime.process.pid).cmdline())

    assert client.ask("DELETE", path).status_code == 200
    assert client.ask("DELETE", path).status_code == 404
    assert client.ask("GET", path).status_code == 404
    assert jupyter(runtime, service, "GET", "/api").status_code == 404
    assert (runtime.process.poll(), runtime.pod.folder.exists()) == (-signal.SIGKILL, False)
    assert 99.5 < service.ledger.available < 100


@pytest.mark.slow
def test_a_runtime_is_spelled_as_asked(service: DatalayerService, client: Client, runtime: Runtime) -> None:
    knobs = service.knobs
    knobs.spelling, knobs.times, knobs.get_key, knobs.has_reservation_id = "B", "iso", "kernel", False
    told = client.ask("GET", f"{RUNTIMES}/runtimes/{runtime.name}").json()["kernel"]
    assert not {"pod_name", "environment_name", "reservation_id"} & told.keys()
    assert told["expired_at"][10] == "T"
    for times, value in (("null", None), ("empty", ""), ("number", runtime.expired_at)):
        knobs.times = times  # type: ignore[assignment]  # each is one
        (told,) = client.ask("GET", f"{RUNTIMES}/runtimes").json()["runtimes"]
        assert told["expired_at"] == value


@pytest.mark.slow
def test_a_runtime_may_have_been_created_whatever_the_answer_was(
    service: DatalayerService, client: Client
) -> None:
    service.knobs.next_creates = [CreateFault.GATEWAY_TIMEOUT, CreateFault.SILENCE, None]
    answer = client.ask("POST", f"{RUNTIMES}/runtimes", BODY_A | {"given_name": "late"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (504, "text/html")
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.session.post(
            f"{service.url}{RUNTIMES}/runtimes", json=BODY_B | {"given_name": "silent"}, timeout=0.5
        )
    wait_until(lambda: len(service.runtimes) == 2)
    client.create(given_name="well")
    assert [runtime.given_name for runtime in service.runtimes] == ["late", "silent", "well"]
    assert [record.status for record in service.requests_to("POST", "/runtimes")] == [504, None, 201]


@pytest.mark.slow
def test_creation_can_be_accepted_and_told_later(service: DatalayerService, client: Client) -> None:
    service.knobs.next_creates = [CreateFault.ACCEPTED]
    answer = client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B)
    statuses = []
    while answer.status_code == 202:
        assert answer.headers["Location"].startswith("/api/")
        statuses.append(answer.status_code)
        time.sleep(0.1)
        answer = client.ask("GET", answer.headers["Location"])
    assert len(statuses) > 2
    assert answer.json()["runtime"]["runtime_name"] == service.runtimes[0].name
    service.knobs.next_creates = [CreateFault.ACCEPTED]
    service.knobs.location, service.knobs.quota = "malformed", 1
    answer = client.ask("POST", f"{RUNTIMES}/runtimes", BODY_B)
    assert answer.headers["Location"].startswith("https:/127.0.0.1:")
    path = "/api/" + answer.headers["Location"].partition("/api/")[2]
    wait_until(lambda: client.ask("GET", path).status_code == 403)


@pytest.mark.slow
def test_the_ingress_warms_up_and_is_choosy(
    service: DatalayerService, client: Client, runtime: Runtime
) -> None:
    wrong = {"Authorization": "token x"}
    assert jupyter(runtime, service, "GET", "/api/kernels", headers=wrong).status_code == 403
    service.knobs.ingress_schemes = ("bearer",)
    assert jupyter(runtime, service, "GET", "/api/kernels").status_code == 401
    bearer = {"Authorization": f"Bearer {runtime.token}"}
    assert jupyter(runtime, service, "GET", "/api/kernels", headers=bearer).status_code == 200
    service.knobs.warm_up = 2
    service.knobs.ingress_schemes = ("token", "bearer")
    fresh = service.runtime(client.create()["runtime_name"])
    answers = [jupyter(fresh, service, "GET", "/api") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[0].headers["Content-Type"] == "text/html"


@pytest.mark.slow
def test_a_runtime_ends_with_its_credits(service: DatalayerService, client: Client) -> None:
    service.knobs.clock_speed = 125 / 3.0  # its credit is for 125 of the cloud's seconds
    told = client.create()
    runtime = service.runtime(told["runtime_name"])
    assert float(told["expired_at"]) == pytest.approx(runtime.started_at + 3, abs=0.1)
    with open_websocket(service, runtime) as websocket:
        assert close_code(websocket) == 1001
    assert time.time() > float(told["expired_at"])
    wait_until(lambda: service.ledger.reservations == [])
    assert client.ask("GET", f"{RUNTIMES}/runtimes/{runtime.name}").status_code == 404
    assert service.ledger.available == pytest.approx(99, abs=0.01)


@pytest.mark.slow
def test_a_runtime_expires_when_asked(service: DatalayerService, runtime: Runtime) -> None:
    service.knobs.end_code = 1006
    with open_websocket(service, runtime) as websocket:
        service.expire(runtime.name)
        assert close_code(websocket) == 1006
    assert service.runtimes == []


@pytest.mark.slow
def test_secrets_are_in_the_pre_warmed_kernel_alone(service: DatalayerService, client: Client) -> None:
    service.secrets.add("SECRET", "xyzzy")
    service.knobs.environments.append(Environment("ada/mine", "Mine", env={"FROM_ENV": "env"}))
    told = client.create(environment={"name": "ada/mine"})
    runtime = service.runtime(told["runtime_name"])
    assert "/ada-mine-pool/" in told["ingress"]
    look = "import os; print(os.environ.get('FROM_ENV'), os.environ.get('SECRET'))"
    assert run(service, runtime, look) == "env xyzzy\n"
    other = jupyter(runtime, service, "POST", "/api/kernels", json={"name": "python3"}).json()["id"]
    assert run(service, runtime, look, other) == "env None\n"


@pytest.mark.slow
def test_a_gpu_is_what_the_knob_says(service: DatalayerService, client: Client) -> None:
    service.knobs.gpu = "NVIDIA A100-SXM4-40GB"
    told = client.create(environment={"name": "python-gpu-env"})
    look = (
        "import subprocess\n"
        "for options in (['-L'], ['--query-gpu=name', '--format=csv,noheader']):\n"
        "    print(subprocess.run(['nvidia-smi', *options], capture_output=True, text=True).stdout, end='')"
    )
    listed, named = run(service, service.runtime(told["runtime_name"]), look).splitlines()
    assert listed.startswith("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-")
    assert named == "NVIDIA A100-SXM4-40GB"


@pytest.mark.slow
def test_variables_come_back_from_a_snapshot(
    service: DatalayerService, client: Client, runtime: Runtime
) -> None:
    run(
        service,
        runtime,
        "import os, threading\nx = 41\nlock = threading.Lock()\ndef f(): pass\nclass C: pass",
    )
    body = {"pod_name": runtime.name, "name": "twice", "description": "d", "stop": False}
    path = f"{RUNTIMES}/runtime-snapshots"
    snapshot = client.ask("POST", path, body).json()["snapshot"]
    assert (snapshot["name"], snapshot["environment"]) == ("twice", "python-cpu-env")
    assert service.snapshots[0].skipped == {"lock": "TypeError"}
    look = "print({'x', 'f', 'C', 'os', 'lock', 'dump', 'load', 'here'} & {*globals()})"
    restored = service.runtime(client.create(**{"from": snapshot["uid"]})["runtime_name"])
    assert run(service, restored, look) == "{'x'}\n"

    run(service, restored, "x = 42; y = 1")
    assert client.ask("PUT", f"{RUNTIMES}/runtimes/{restored.name}", {"from": snapshot["uid"]}).json()[
        "success"
    ]
    assert run(service, restored, "print(x, y)") == "41 1\n"

    service.knobs.snapshot_answer = "accepted"
    body = {"runtime_name": restored.name, "name": "twice"}  # which stops it
    answer = client.ask("POST", f"{RUNTIMES}/sandbox-snapshots", body)
    assert (answer.status_code, answer.content) == (202, b"")
    assert [runtime.name for runtime in service.runtimes] == [runtime.name]
    wait_until(lambda: len(client.ask("GET", path).json()["snapshots"]) == 2)
    assert {s["name"] for s in client.ask("GET", path).json()["snapshots"]} == {"twice"}
    path += f"/{snapshot['uid']}"
    assert client.ask("PATCH", path, {"name": "new"}).json()["snapshot"]["name"] == "new"
    download = {"download": "1", "token": service.api_key}
    assert requests.get(f"{service.url}{path}", download, timeout=60).content == service.snapshots[0].data
    assert [client.ask("DELETE", path).status_code for _ in range(2)] == [200, 404]


@pytest.mark.slow
def test_a_snapshot_of_a_busy_kernel_is_refused_after_a_while(
    service: DatalayerService, client: Client, runtime: Runtime
) -> None:
    service.knobs.snapshot_patience = 0.3
    with open_websocket(service, runtime) as websocket:
        send(websocket, "print('began', flush=True)\nimport time; time.sleep(60)")
        while json.loads(websocket.recv(60))["msg_type"] != "stream":
            pass
        body = {"runtime_name": runtime.name, "name": "", "stop": False}
        assert client.ask("POST", f"{RUNTIMES}/sandbox-snapshots", body).status_code == 409
        interrupted = jupyter(runtime, service, "POST", f"/api/kernels/{runtime.kernel_id}/interrupt")
        assert interrupted.status_code == 204
        while (message := json.loads(websocket.recv(60)))["msg_type"] != "error":
            pass
        assert message["content"]["ename"] == "KeyboardInterrupt"
    assert service.snapshots == []


@pytest.mark.slow
def test_websockets_close_as_asked(service: DatalayerService, runtime: Runtime) -> None:
    faults = service.faults
    session = uuid.uuid4().hex
    with open_websocket(service, runtime, session=session) as websocket:
        number = send(websocket, "print('began', flush=True)\nimport time; time.sleep(0.5); print('ended')")
        while json.loads(websocket.recv(60))["msg_type"] != "stream":
            pass
        faults.close(runtime.name, 1006)
        assert close_code(websocket) == 1006
    # The server has kept what came in the meantime, for this session.
    with open_websocket(service, runtime, session=session) as websocket:
        assert printed(receive(websocket, number)) == "ended\n"
        faults.close(runtime.name, 1001)
        assert close_code(websocket) == 1001
    with open_websocket(service, runtime) as websocket:
        faults.close_before(runtime.name, b'"execute_reply"', 1012)
        send(websocket, "1")
        assert close_code(websocket) == 1012
    assert run(service, runtime, "print(1)") == "1\n"
    faults.wait_until_open(runtime.name, 0)


@pytest.mark.slow
def test_a_stalled_websocket_loses_all_and_tells_nobody(service: DatalayerService, runtime: Runtime) -> None:
    session = uuid.uuid4().hex
    quiet: dict[str, Any] = {"ping_interval": None, "close_timeout": 0.1}
    with open_websocket(service, runtime, session=session, **quiet) as websocket:
        receive(websocket, send(websocket, "x = 1"))
        service.faults.stall(runtime.name)
        send(websocket, "x = 2")
        with pytest.raises(TimeoutError):
            websocket.recv(0.3)
    assert service.faults.open(runtime.name) == 1
    with open_websocket(service, runtime, session=session) as websocket:
        assert printed(receive(websocket, send(websocket, "print(x)"))) == "1\n"
        # The server has replaced the stale one.
        service.faults.wait_until_open(runtime.name, 1)
    service.faults.wait_until_open(runtime.name, 0)


@pytest.mark.slow
def test_messages_can_come_twice_and_heartbeats_never(service: DatalayerService, runtime: Runtime) -> None:
    service.faults.duplicate(runtime.name)
    with open_websocket(service, runtime) as websocket:
        number = send(websocket, "print('once')")
        messages: list[dict[str, Any]] = []
        while len(messages) < 10:  # busy, input, stream, reply and idle
            message = json.loads(websocket.recv(60))
            messages += [message] if message["parent_header"].get("msg_id") == number else []
    assert {sum(m["header"] == message["header"] for m in messages) for message in messages} == {2}
    service.faults.duplicate(runtime.name, False)
    service.faults.lose_heartbeats(runtime.name)
    with open_websocket(service, runtime, ping_interval=None) as websocket:
        assert not websocket.ping().wait(0.3)
        service.faults.lose_heartbeats(runtime.name, False)
        assert websocket.ping().wait(60)
        assert printed(receive(websocket, send(websocket, "print('once')"))) == "once\n"


@pytest.mark.slow
def test_large_messages_pass_or_close(service: DatalayerService, runtime: Runtime) -> None:
    with open_websocket(service, runtime) as websocket:
        messages = receive(websocket, send(websocket, "'x' * 3_000_000"))
        (result,) = (m["content"]["data"] for m in messages if m["msg_type"] == "execute_result")
        assert len(result["text/plain"]) == 3_000_002
        send(websocket, f"'{'x' * 10 * 2**20}'")
        assert close_code(websocket) == 1009


@pytest.mark.slow
def test_a_handshake_is_refused_and_its_subprotocol_is_not_selected(
    service: DatalayerService, runtime: Runtime
) -> None:
    subprotocol: Any = "v1.kernel.websocket.jupyter.org"
    service.faults.refuse(runtime.name, 1, 503)
    with pytest.raises(InvalidStatus) as refused, open_websocket(service, runtime):
        pass
    assert refused.value.response.status_code == 503
    with pytest.raises(InvalidStatus) as refused, open_websocket(service, runtime, str(uuid.uuid4())):
        pass
    assert refused.value.response.status_code == 404
    with open_websocket(service, runtime, subprotocols=[subprotocol]) as websocket:
        assert websocket.subprotocol == subprotocol
    service.knobs.selects_v1 = False
    with open_websocket(service, runtime, subprotocols=[subprotocol]) as websocket:
        assert websocket.subprotocol is None


def processes_in(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in value for value in (*process.environ().values(), *process.cmdline())):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_an_exception_leaves_nothing_behind() -> None:
    folders = []

    def fail() -> None:
        with DatalayerService() as service:
            client = Client(service)
            runtime = service.runtime(client.create()["runtime_name"])
            client.session.close()
            run(service, runtime, "import subprocess as s; s.Popen(['sleep', '60'], start_new_session=True)")
            folders.append(runtime.pod.folder.parent)
            # The janitor, the server, its kernel, and what that has started.
            assert len(processes_in(folders[0])) >= 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (processes_in(folders[0]), folders[0].exists()) == ([], False)


@pytest.mark.slow
def test_the_sudden_end_of_its_process_leaves_nothing_behind() -> None:
    program = (
        "import os, requests\n"
        "from tests.datalayer_service import DatalayerService\n"
        "service = DatalayerService()\n"
        "headers = {'Authorization': f'Bearer {service.api_key}'}\n"
        "body = {'environment_name': 'python-cpu-env', 'credits_limit': 1}\n"
        "path = '/api/runtimes/v1/runtimes'\n"
        "assert requests.post(service.url + path, json=body, headers=headers).status_code == 201\n"
        "print(service.runtimes[0].pod.folder.parent, flush=True)\n"
        "os._exit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 3
    folder = Path(ended.stdout.strip())
    assert folder.name.startswith("dl-")
    wait_until(lambda: not folder.exists() and not processes_in(folder))


@pytest.mark.slow
def test_it_runs_by_hand_until_interrupted() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.datalayer_service"], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        variables = dict(program.stdout.readline().split()[1].split("=", 1) for _ in range(2))
        url, key = variables["DATALAYER_RUN_URL"], variables["DATALAYER_API_KEY"]
        answer = requests.get(f"{url}{IAM}/whoami", headers={"Authorization": f"Bearer {key}"}, timeout=60)
        assert answer.status_code == 200
        program.send_signal(signal.SIGINT)
    assert program.returncode == 0
