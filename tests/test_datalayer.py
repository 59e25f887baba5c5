"""datalayer-runtime against a service on this machine: one runtime for each sandbox, and none afterwards."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from code_sandboxes import (
    AsyncDatalayerSandbox,
    AsyncSandbox,
    DatalayerSandbox,
    GPUType,
    Sandbox,
    SandboxAuthenticationError,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
    SandboxNotStartedError,
    SandboxPool,
    SandboxQuotaExceededError,
    SandboxResourceError,
    SandboxSnapshotError,
    SandboxSnapshotWarning,
)
from code_sandboxes.front import known_variant
from code_sandboxes.isolation.gpus import is_named
from code_sandboxes.remote.datalayer_values import (
    environment_of,
    free_credits_of,
    quantity,
    runtime_of,
    seconds_of,
)
from code_sandboxes.variants import remote_guards
from code_sandboxes.variants.datalayer_accounts import account_of
from conftest import BUSY, wait_until
from tests.datalayer_service import CreateFault, DatalayerService, Environment
from tests.test_packages import wheel

RUNTIMES = "/api/runtimes/v1/runtimes"

Create = Callable[..., Sandbox]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatalayerService]:
    monkeypatch.setattr(remote_guards, "_LOOKS", (0.5,))  # nothing takes longer here
    before = reapers()  # of what other tests share
    with DatalayerService() as service:
        yield service
        # Whatever a test was about: nothing that costs credits is left, nor what watches over that.
        wait_until(lambda: service.runtimes == [] and service.ledger.reservations == [])
        wait_until(lambda: set(reapers()) <= set(before))


@pytest.fixture
def account(service: DatalayerService) -> dict[str, Any]:
    """The options that lead to the service."""
    return {"run_url": service.url, "token": service.api_key}


@pytest.fixture
def create(account: dict[str, Any]) -> Iterator[Create]:
    """Makes sandboxes that end with the test."""
    made: list[Sandbox] = []

    def create(**settings: Any) -> Sandbox:
        made.append(Sandbox.create("datalayer-runtime", **account, **settings))
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.kill()


def reapers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "reaper.py" in command_of(child)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def posts(service: DatalayerService) -> list[dict[str, Any]]:
    """The bodies with which runtimes were asked for."""
    return [record.body for record in service.requests_to("POST", "/runtimes")]  # type: ignore[misc]  # JSON


def program(service: DatalayerService, code: str) -> subprocess.Popen[str]:
    """Another program that uses the account."""
    environment = {**os.environ, "DATALAYER_RUN_URL": service.url, "DATALAYER_API_KEY": service.api_key}
    return subprocess.Popen(
        [sys.executable, "-c", f"from code_sandboxes import Sandbox\n{code}"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# One that is made, used and ended.


def test_a_sandbox_is_a_runtime_and_its_end_is_the_end_of_that(
    service: DatalayerService, create: Create
) -> None:
    sandbox = create(name="demo", env={"MINE": "5"}, cpu=1, memory=2048)
    (runtime,) = service.runtimes

    assert sandbox.run_code("import os\nx = int(os.environ['MINE'])\nx + 1").text == "6"
    assert sandbox.id == f"datalayer-runtime:{runtime.name}"
    assert sandbox.variant == "datalayer-runtime"
    assert runtime.given_name.startswith("demo-")
    metadata = sandbox.info.metadata
    assert (metadata["runtime"], metadata["uid"]) == (runtime.name, runtime.uid)
    assert (metadata["environment"], metadata["burning_rate"]) == ("python-cpu-env", 0.008)
    assert metadata["expires_at"] == pytest.approx(runtime.expired_at)
    assert sandbox.info.end_at == pytest.approx(runtime.expired_at, abs=5)
    # The kernel that was there: secrets and snapshots are in it alone.
    assert metadata["kernel_ids"] == [runtime.kernel_id]

    assert sandbox.terminate() is True
    assert service.runtimes == []
    assert [entry.kind for entry in service.ledger.entries] == ["reserve", "refund"]
    with pytest.raises(SandboxNotStartedError, match="terminated"):
        sandbox.run_code("1")


@pytest.mark.slow
def test_its_environment_is_there_again_after_a_restart(create: Create, tmp_path: Path) -> None:
    config = SandboxConfig(working_dir=str(tmp_path), env_vars={"MINE": "5"})
    sandbox = create(config=config)
    dead = sandbox.run_code("import os; os._exit(1)")

    assert dead.status == "kernel_died"
    assert sandbox.run_code("import os; print(os.environ['MINE'], os.getcwd())").stdout == f"5 {tmp_path}"
    sandbox.restart()
    assert sandbox.run_code("import os; print(os.environ['MINE'], os.getcwd())").stdout == f"5 {tmp_path}"


@pytest.mark.slow
def test_without_a_kernel_one_is_started(service: DatalayerService, create: Create) -> None:
    service.knobs.pre_warmed = False
    assert create().run_code("40 + 2").text == "42"


@pytest.mark.slow
def test_both_fronts_and_classes_have_it(service: DatalayerService, account: dict[str, Any]) -> None:
    with DatalayerSandbox(**account) as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"

    async def main() -> None:
        async with AsyncSandbox.create("datalayer-runtime", **account) as sandbox:
            assert isinstance(sandbox, AsyncDatalayerSandbox)
            assert (await sandbox.run_code("1 + 1")).text == "2"
            assert [info.id for info in await AsyncSandbox.list("datalayer-runtime")] == [sandbox.id]
        environments = await AsyncSandbox.list_environments("datalayer-runtime", **account)
        assert environments == Sandbox.list_environments("datalayer-runtime", **account)

    asyncio.run(main())


@pytest.mark.slow
def test_a_pool_hands_them_out(service: DatalayerService, account: dict[str, Any]) -> None:
    with SandboxPool("datalayer-runtime", size=2, **account) as pool:
        for _ in range(2):
            sandbox = pool.acquire(timeout=60)
            assert sandbox.run_code("was_used = 'used' in dir(); used = True; was_used").text == "False"
            pool.release(sandbox)
    assert len(posts(service)) <= 5


# Where it is.


def test_it_is_the_default_where_there_is_an_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODE_SANDBOXES_VARIANT", raising=False)
    monkeypatch.delenv("DATALAYER_API_KEY", raising=False)
    assert known_variant(None) == "local-jupyter"
    monkeypatch.setenv("DATALAYER_API_KEY", "key")
    assert known_variant(None) == "datalayer-runtime"
    monkeypatch.setenv("CODE_SANDBOXES_VARIANT", "local-eval")
    assert known_variant(None) == "local-eval"


def test_the_services_are_where_options_the_environment_and_a_file_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("API_KEY", "RUN_URL", "IAM_URL", "RUNTIMES_URL"):
        monkeypatch.delenv(f"DATALAYER_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SandboxAuthenticationError, match="DATALAYER_API_KEY"):
        account_of({})

    monkeypatch.setenv("DATALAYER_API_KEY", "key")
    account = account_of({})
    assert (account.iam, account.runtimes) == ("https://prod1.datalayer.run", "https://r1.datalayer.run")
    (tmp_path / ".datalayer").mkdir()
    (tmp_path / ".datalayer" / "config.json").write_text('{"runtimes_url": "https://file.example/"}')
    assert account_of({}).runtimes == "https://file.example"
    monkeypatch.setenv("DATALAYER_RUN_URL", "https://one.example/")
    monkeypatch.setenv("DATALAYER_IAM_URL", "https://iam.example")
    account = account_of({})
    assert (account.iam, account.runtimes) == ("https://iam.example", "https://one.example")
    account = account_of({"run_url": "https://given.example", "token": "other"})
    assert (account.iam, account.runtimes) == ("https://given.example",) * 2
    assert account.token == "other"
    assert "other" not in repr(account)


# What it may cost.


def test_credits_are_reserved_for_its_lifetime(service: DatalayerService, create: Create) -> None:
    create().terminate()
    create(config=SandboxConfig(max_lifetime=3600)).terminate()

    assert [body["credits_limit"] for body in posts(service)] == pytest.approx([0.008 * 600, 0.008 * 3600])


@pytest.mark.slow
def test_where_nobody_knows_what_it_costs_half_of_the_credits_are_reserved(
    service: DatalayerService, create: Create
) -> None:
    service.knobs.environments = [Environment("python-cpu-env", "Python", burning_rate=0.0)]
    with pytest.raises(SandboxConnectionError, match="500: ZeroDivisionError"):  # this service has to know
        create()
    assert posts(service)[0]["credits_limit"] == pytest.approx(50.0)


def test_without_credits_nothing_is_asked_for(service: DatalayerService, create: Create) -> None:
    service.knobs.environments = [Environment("python-cpu-env", "Python", burning_rate=0.0)]
    service.ledger.reserve(100.0, 1.0)
    with pytest.raises(SandboxQuotaExceededError, match="no credits for a runtime of 'python-cpu-env'"):
        create()
    assert posts(service) == []
    service.ledger.refund(service.ledger.reservations[0], started_at=None)


def test_more_than_there_is_is_a_matter_of_quota(create: Create) -> None:
    with pytest.raises(SandboxQuotaExceededError, match="Not enough credits"):
        create(config=SandboxConfig(max_lifetime=7 * 86400))


@pytest.mark.parametrize("status", [403, 429, 200])
def test_too_many_runtimes_are_a_matter_of_quota(
    service: DatalayerService, create: Create, status: int
) -> None:
    service.knobs.quota, service.knobs.quota_status = 0, status
    with pytest.raises(SandboxQuotaExceededError, match="limit of 0 simultaneous runtimes"):
        create()
    assert len(posts(service)) == 1


# How it ends by itself.


@pytest.mark.slow
def test_its_lifetime_can_be_cut_and_not_extended_beyond_what_is_reserved(
    service: DatalayerService, create: Create
) -> None:
    sandbox = create()
    with pytest.raises(SandboxConfigurationError, match=r"let it end only in 3600 s: in \d+ s the credits"):
        sandbox.set_timeout(3600)
    sandbox.set_timeout(1)
    assert sandbox.info.end_at == pytest.approx(time.time() + 1, abs=1)
    wait_until(lambda: service.runtimes == [])
    wait_until(lambda: sandbox.status == "stopped")


@pytest.mark.slow
def test_it_ends_when_its_credits_are_used_up(service: DatalayerService, create: Create) -> None:
    service.knobs.clock_speed = 150.0  # 600 s are over in 4
    sandbox = create()
    assert sandbox.info.end_at == pytest.approx(time.time() + 4, abs=3)
    wait_until(lambda: sandbox.status == "stopped")
    with pytest.raises(SandboxNotStartedError, match="the credits that were reserved for its runtime are"):
        sandbox.run_code("1")


@pytest.mark.slow
@pytest.mark.parametrize("code", [1001, 1006])
def test_a_run_that_the_end_of_the_runtime_cuts_short_is_no_success(
    service: DatalayerService, create: Create, code: int
) -> None:
    service.knobs.end_code = code
    sandbox = create()
    (runtime,) = service.runtimes
    lines: list[str] = []

    def on_stdout(message: Any) -> None:
        lines.append(message.line)
        service.expire(runtime.name)

    result = sandbox.run_code(f"print('before', flush=True)\n{BUSY}", on_stdout=on_stdout)

    assert result.status in ("kernel_died", "connection_lost")
    assert not result.success
    assert result.stdout == "before"
    again = sandbox.run_code("1 + 1")
    assert not again.success
    assert again.error is not None
    assert f"its runtime {runtime.name} has ended" in again.error.value
    wait_until(lambda: sandbox.status == "stopped")
    assert Sandbox.list("datalayer-runtime") == []


@pytest.mark.slow
def test_a_connection_that_is_away_for_a_moment_costs_nothing(
    service: DatalayerService, create: Create
) -> None:
    sandbox = create()
    (runtime,) = service.runtimes
    lines: list[str] = []

    def on_stdout(message: Any) -> None:
        if not lines:
            service.faults.refuse(runtime.name, 2)
            service.faults.close(runtime.name)
        lines.append(message.line)

    code = "import time\nfor i in range(30): print(i, flush=True); time.sleep(0.05)"
    result = sandbox.run_code(code, on_stdout=on_stdout)

    assert result.success, result
    assert lines == [str(number) for number in range(30)]


@pytest.mark.slow
def test_an_end_that_cannot_be_brought_about_is_told(service: DatalayerService, create: Create) -> None:
    sandbox = create()
    name = service.runtimes[0].name
    service.knobs.bad_gateways = 1000
    with pytest.raises(
        SandboxConnectionError, match=f"the runtime {name} may be left at .* and cost credits"
    ):
        sandbox.terminate()
    service.knobs.bad_gateways = 0
    service.expire(name)
    sandbox._core.variant.remove()  # so that nobody watches over it any more


# What it is made of.


def test_environments_are_listed_page_by_page(service: DatalayerService, account: dict[str, Any]) -> None:
    service.knobs.page_size = 1
    environments = Sandbox.list_environments("datalayer-runtime", **account)
    assert [each.name for each in environments] == ["python-cpu-env", "python-gpu-env", "ai-agents-env"]
    gpu = environments[1]
    assert (gpu.title, gpu.language, gpu.owner, gpu.visibility) == (
        "Python GPU",
        "python",
        "datalayer",
        "public",
    )
    assert (gpu.burning_rate, gpu.cpu, gpu.memory, gpu.gpus) == (0.05, 1.0, 2 * 1024**3, 1)


def test_other_variants_have_no_environments() -> None:
    with pytest.raises(SandboxConfigurationError, match="local-eval has no environments to choose from"):
        Sandbox.list_environments("local-eval")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"network_policy": "none"}, SandboxConfigurationError, "cannot enforce network_policy='none'"),
        ({"allowed_hosts": ["a"], "network_policy": "allowlist"}, SandboxConfigurationError, "'allowlist'"),
        ({"config": SandboxConfig(idle_timeout=5)}, SandboxConfigurationError, "enforce idle_timeout=5"),
        ({"config": SandboxConfig(max_lifetime=0)}, SandboxConfigurationError, "live without an end"),
        ({"cpu": 1.5}, SandboxConfigurationError, r"provide 1.5 CPUs \(cpu=\) in .*: it has 1;"),
        ({"memory": 2049}, SandboxConfigurationError, r"bytes of memory \(memory=\) in .*: it has 2,147,483"),
        ({"gpu": "T4", "environment": "ai-agents-env"}, SandboxConfigurationError, "with a GPU: python-gpu"),
        ({"environment": "nowhere-env"}, SandboxResourceError, "'nowhere-env'.*ai-agents-env, python-cpu-"),
        ({"kernel_name": "python3"}, TypeError, "no option 'kernel_name'"),
        ({"token": 5}, TypeError, "token must be a str"),
        ({"token": "a\nb"}, SandboxConfigurationError, "characters that no API key has"),
        ({"token": "unknown"}, SandboxAuthenticationError, "does not take this token"),
        ({"run_url": "nowhere"}, SandboxConfigurationError, "run_url must be a URL"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked_for(
    service: DatalayerService,
    account: dict[str, Any],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        Sandbox.create("datalayer-runtime", **{**account, **settings})
    assert posts(service) == []


@pytest.mark.slow
def test_a_gpu_is_found_in_what_came(service: DatalayerService, create: Create) -> None:
    sandbox = create(gpu=GPUType.T4)
    assert posts(service)[0]["environment_name"] == "python-gpu-env"
    assert sandbox.run_code("x = 1").success
    assert sandbox.info.resources.gpu == "T4"
    assert "gpus" not in (sandbox.run_code("dir()").text or "")


@pytest.mark.slow
def test_another_gpu_is_sent_back(service: DatalayerService, create: Create) -> None:
    with pytest.raises(SandboxResourceError, match=r"gpu='A100' was asked for, .* other GPUs: Tesla T4"):
        create(gpu="A100", environment="python-gpu-env")
    assert service.runtimes == []


@pytest.mark.slow
def test_the_environment_that_promises_the_gpu_is_chosen(service: DatalayerService, create: Create) -> None:
    service.knobs.environments.append(Environment("big-env", "Python on an H100", gpus=1))
    service.knobs.gpu = "NVIDIA H100 80GB HBM3"
    create(gpu="H100")
    assert posts(service)[0]["environment_name"] == "big-env"


def test_without_environments_that_have_a_gpu_there_is_none(
    service: DatalayerService, create: Create
) -> None:
    service.knobs.environments = [Environment("python-cpu-env", "Python")]
    with pytest.raises(
        SandboxResourceError, match=r"no environment with a GPU .*\(there are: python-cpu-env"
    ):
        create(gpu="T4")


@pytest.mark.parametrize(
    ("wanted", "model", "is_it"),
    [
        (GPUType.T4, "Tesla T4", True),
        (GPUType.A10, "NVIDIA A100-SXM4-40GB", False),
        (GPUType.A10, "NVIDIA A10G", False),
        (GPUType.A100, "NVIDIA A100-SXM4-80GB", True),
        (GPUType.A100_80GB, "NVIDIA A100-SXM4-80GB", True),
        (GPUType.A100_80GB, "NVIDIA A100-SXM4-40GB", False),
        ("80GB A100", "NVIDIA A100-SXM4-80GB", False),
        ("geforce rtx 4090", "NVIDIA GeForce RTX 4090", True),
        ("", "Tesla T4", False),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(wanted: str, model: str, is_it: bool) -> None:
    assert is_named(wanted, model) is is_it


# Deployments differ.


@pytest.mark.slow
@pytest.mark.parametrize("times", ["numeric_string", "number", "iso", "null", "empty"])
def test_times_can_be_said_in_several_ways(service: DatalayerService, create: Create, times: Any) -> None:
    service.knobs.times = times
    sandbox = create()
    assert sandbox.info.end_at == pytest.approx(service.runtimes[0].expired_at, abs=5)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["A", "B"])
def test_either_generation_of_the_interface_will_do(
    service: DatalayerService, create: Create, account: dict[str, Any], generation: Any
) -> None:
    knobs = service.knobs
    knobs.bodies = knobs.spelling = generation
    knobs.rejects_unknown_keys = True
    knobs.has_reservation_id = False
    knobs.get_key = "runtime" if generation == "B" else "kernel"
    knobs.snapshot_paths = (f"{'runtime' if generation == 'A' else 'sandbox'}-snapshots",)
    knobs.snapshot_delete_status = knobs.delete_status = 204
    sandbox = create()
    sandbox.run_code("x = 5")
    snapshot = sandbox.create_snapshot("mine")
    sandbox.detach()
    again = Sandbox.from_id(sandbox.id, **account)

    assert again.run_code("x").text == "5"
    assert again.info.metadata["environment"] == "python-cpu-env"
    again.delete_snapshot(snapshot.id)
    assert again.list_snapshots() == []
    again.terminate()
    # What it understands is found out once.
    statuses = [record.status for record in service.requests_to("POST", "/runtimes")]
    assert statuses == ([201] if generation == "A" else [422, 201])


@pytest.mark.slow
def test_the_ingress_may_want_another_scheme(service: DatalayerService, create: Create) -> None:
    service.knobs.ingress_schemes = ("bearer",)
    assert create().run_code("40 + 2").text == "42"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1767225600.5", 1767225600.5),
        (1767225600, 1767225600.0),
        ("2026-01-01T00:00:00Z", 1767225600.0),
        ("2026-01-01T00:00:00", 1767225600.0),
        ("2026-01-01T01:00:00.1234567+01:00", 1767225600.123456),
        ("2026-01-01T00:00:00.5Z", 1767225600.5),
        ("", None),
        (None, None),
        (True, None),
        ("nan", None),
        ("1e400", None),
        ("yesterday", None),
        ({}, None),
    ],
)
def test_a_time_is_read_as_it_is_said(value: object, seconds: float | None) -> None:
    assert seconds_of(value) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("value", "amount"),
    [
        ("1", 1),
        (2, 2),
        ("500m", 0.5),
        ("2Gi", 2 * 1024**3),
        ("2G", 2e9),
        ("1e3", 1000),
        ("?", None),
        ("", None),
    ],
)
def test_a_quantity_is_read_as_kubernetes_does(value: object, amount: float | None) -> None:
    assert quantity(value) == (None if amount is None else pytest.approx(amount))


@pytest.mark.parametrize(
    ("credits", "reservations", "free"),
    [
        ({"credits": 10, "quota": None}, [], 10),
        ({"credits": 10, "quota": 30}, [{"credits": 5}], 15),
        ({"credits": 10, "quota": 30, "remaining": 7}, [{"credits": "2"}, {}, None], 5),
        ({"credits": 10, "available": 1, "remaining": 7}, None, 1),
    ],
)
def test_free_credits_are_counted_as_they_are_told(credits: Any, reservations: Any, free: float) -> None:
    assert free_credits_of({"credits": credits, "reservations": reservations}) == free


def test_what_cannot_be_read_is_no_answer_of_datalayer() -> None:
    for read in (runtime_of, environment_of, free_credits_of):
        with pytest.raises(SandboxConnectionError, match="Datalayer"):
            read({})


# What goes wrong while it is made: there is one in the end, or none.


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [CreateFault.BAD_GATEWAY, CreateFault.NO_CAPACITY, CreateFault.FAILED_WITH_200]
)
def test_what_passes_is_tried_again(service: DatalayerService, create: Create, fault: CreateFault) -> None:
    service.knobs.next_creates = [fault]
    assert create().run_code("40 + 2").text == "42"
    assert len(service.runtimes) == 1
    first, second = posts(service)
    assert first["given_name"] == second["given_name"]
    assert service.ledger.entries[0].kind == "reserve"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [CreateFault.GATEWAY_TIMEOUT, CreateFault.SILENCE])
def test_what_was_made_without_an_answer_is_found_and_not_made_twice(
    service: DatalayerService, create: Create, fault: CreateFault
) -> None:
    service.knobs.create_fault = fault
    sandbox = create(config=SandboxConfig(start_timeout=8))
    assert sandbox.run_code("40 + 2").text == "42"
    assert len(posts(service)) == 1
    assert [entry.kind for entry in service.ledger.entries] == ["reserve"]
    assert sandbox.info.metadata["runtime"] == service.runtimes[0].name


@pytest.mark.slow
@pytest.mark.parametrize("location", ["relative", "absolute", "other_scheme", "malformed"])
def test_what_takes_its_time_is_asked_about_where_it_says(
    service: DatalayerService, create: Create, location: Any
) -> None:
    service.knobs.create_fault, service.knobs.location = CreateFault.ACCEPTED, location
    assert create().run_code("40 + 2").text == "42"
    assert len(posts(service)) == 1


@pytest.mark.slow
def test_what_is_not_told_in_time_is_found_all_the_same(service: DatalayerService, create: Create) -> None:
    service.knobs.create_fault, service.knobs.accepted_polls = CreateFault.ACCEPTED, 1000
    sandbox = create(config=SandboxConfig(start_timeout=2))
    assert sandbox.info.metadata["runtime"] == service.runtimes[0].name
    assert len(posts(service)) == 1


@pytest.mark.parametrize("fault", [CreateFault.NO_CAPACITY, CreateFault.FAILED_WITH_200])
def test_no_capacity_is_told_in_the_end(
    service: DatalayerService, create: Create, fault: CreateFault
) -> None:
    service.knobs.create_fault = fault
    with pytest.raises(SandboxResourceError, match="No runtime available: no_runtime_available"):
        create(config=SandboxConfig(start_timeout=1))


@pytest.mark.slow
@pytest.mark.parametrize("status", [502, 503, 504, 404])
def test_the_way_to_a_runtime_may_not_be_there_at_once(
    service: DatalayerService, create: Create, status: Any
) -> None:
    service.knobs.warm_up, service.knobs.warm_up_status = 4, status
    assert create().run_code("40 + 2").text == "42"


@pytest.mark.slow
def test_a_runtime_that_is_never_reached_is_ended(service: DatalayerService, create: Create) -> None:
    service.knobs.warm_up = 10**9
    with pytest.raises(
        SandboxConnectionError, match=r"was not there within 1 s \(SandboxConfig.start_timeout"
    ):
        create(config=SandboxConfig(start_timeout=1))
    assert [record.status for record in service.requests if record.method == "DELETE"] == [200]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, CreateFault.ACCEPTED, CreateFault.SILENCE])
def test_an_interrupted_start_leaves_nothing(service: DatalayerService, fault: CreateFault | None) -> None:
    service.knobs.create_fault, service.knobs.warm_up = fault, 10**9
    service.knobs.accepted_polls = 6
    code = (
        "from code_sandboxes import SandboxConfig\n"
        "try: Sandbox.create('datalayer-runtime', config=SandboxConfig(start_timeout=8))\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    started = program(service, code)
    wait_until(lambda: service.runtimes)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=60)[0] == "interrupted\n"
    wait_until(lambda: service.runtimes == [])


# Other programs.


@pytest.mark.slow
def test_it_is_found_by_its_id_its_name_and_its_uid(
    service: DatalayerService, create: Create, account: dict[str, Any]
) -> None:
    sandbox = create(name="demo", tags={"kind": "test"})
    sandbox.run_code("x = 5")
    (runtime,) = service.runtimes

    for name in (sandbox.id, runtime.name, runtime.uid, runtime.given_name):
        assert Sandbox.from_id(name, **account)._core is sandbox._core
    (info,) = Sandbox.list("datalayer-runtime", tags={"kind": "test"})
    assert (info.id, info.name) == (sandbox.id, "demo")
    assert info.end_at == pytest.approx(runtime.expired_at, abs=5)
    assert Sandbox.list("datalayer-runtime", tags={"kind": "other"}) == []

    sandbox.detach()
    assert Sandbox.list("datalayer-runtime") == []  # with no key, none is known
    for name in (sandbox.id, runtime.name, runtime.uid, f"{sandbox.id}#{runtime.kernel_id}"):
        again = Sandbox.from_id(name, **account)
        assert again.id == sandbox.id
        assert again.run_code("x").text == "5"
        assert again.info.end_at == pytest.approx(runtime.expired_at, abs=5)
        again.detach()
    with pytest.raises(SandboxNotFoundError, match="there is no kernel 0-0 in the runtime"):
        Sandbox.from_id(f"{sandbox.id}#0-0", **account)
    assert Sandbox.from_id(sandbox.id, **account).kill() is True


def test_what_is_not_there_is_not_found(account: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datalayer-runtime:runtime-0", "runtime-0", "../../iam/v1/whoami"):
        with pytest.raises(SandboxNotFoundError, match="it has ended, or never was"):
            Sandbox.from_id(name, **account)
    with pytest.raises(SandboxNotFoundError, match="is the name of its runtime"):
        Sandbox.from_id("datalayer-runtime:", **account)
    with pytest.raises(TypeError, match=r"takes token= and run_url= \(given: kernel_name\)"):
        Sandbox.from_id("runtime-0", kernel_name="x")
    monkeypatch.delenv("DATALAYER_API_KEY", raising=False)
    with pytest.raises(SandboxNotFoundError, match="no API key; pass token="):
        Sandbox.from_id("runtime-0")
    assert Sandbox.list("datalayer-runtime") == []


@pytest.mark.slow
def test_another_program_goes_on_with_what_was_detached(
    service: DatalayerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "s = Sandbox.create('datalayer-runtime', name='kept'); s.run_code('x = 5'); s.detach(); print(s.id)"
    )
    sandbox_id = program(service, code).communicate(timeout=60)[0].strip()
    monkeypatch.setenv("DATALAYER_RUN_URL", service.url)
    monkeypatch.setenv("DATALAYER_API_KEY", service.api_key)

    assert [(info.id, info.name) for info in Sandbox.list("datalayer-runtime")] == [(sandbox_id, "kept")]
    sandbox = Sandbox.from_id(sandbox_id)
    assert sandbox.run_code("x").text == "5"
    assert pickle.loads(pickle.dumps(sandbox)).id == sandbox_id
    # Who only uses it does not end it with its own end.
    used = program(service, f"print(Sandbox.from_id({sandbox_id!r}).run_code('x + 1').text)")
    assert used.communicate(timeout=60)[0] == "6\n"
    assert len(service.runtimes) == 1
    sandbox.terminate()


@pytest.mark.slow
def test_its_program_ends_and_it_does(service: DatalayerService) -> None:
    created = program(service, "Sandbox.create('datalayer-runtime'); print('made')")
    assert created.communicate(timeout=60)[0] == "made\n"
    assert service.runtimes == []


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [0, 10**9], ids=["made", "in the making"])
def test_its_program_is_killed_and_it_ends(service: DatalayerService, warm_up: int) -> None:
    service.knobs.warm_up = warm_up
    created = program(service, "s = Sandbox.create('datalayer-runtime'); print('made', flush=True); input()")
    if warm_up == 0:
        assert created.stdout is not None
        assert created.stdout.readline() == "made\n"
    wait_until(lambda: service.runtimes)
    created.kill()
    created.communicate()
    wait_until(lambda: service.runtimes == [])


# Snapshots.

SESSION = """
import math, pandas as pd
df = pd.DataFrame({'a': [1, 2]})
offset = 2560  # of which the pickle has what the cloud takes for the end of it
def plus(x): return x + offset
class Point:
    def __init__(self, x): self.x = x
point = Point(3)
points = [point, point]
lines = (line for line in 'ab')
open(os.path.expanduser('~/data.txt'), 'w').write('hello')
"""


@pytest.mark.slow
def test_a_session_is_there_again(service: DatalayerService, create: Create) -> None:
    sandbox = create()
    assert sandbox.run_code(f"import os{SESSION}").success

    snapshot = sandbox.create_snapshot("my-setup")

    assert {"df", "pd", "plus", "Point", "points", "offset"} <= set(snapshot.variables)
    assert snapshot.not_carried == {"lines": "cannot pickle 'generator' object"}
    # It goes on, and there is no trace.
    assert sandbox.run_code("[each for each in dir() if 'sandboxes' in each]").text == "[]"
    assert sandbox.run_code("plus(1)").text == "2561"

    with pytest.warns(SandboxSnapshotWarning, match="'my-setup' was restored: lines are missing"):
        restored = create(snapshot_name="my-setup")

    assert restored.run_code("print(df)").stdout.split() == ["a", "0", "1", "1", "2"]
    code = "pd.__name__, math.floor(1.5), plus(1), type(point) is Point, points[0] is point is points[1]"
    assert restored.run_code(code).text == "('pandas', 1, 2561, True, True)"
    assert restored.files.read("data.txt") == "hello"
    assert restored.run_code("[each for each in dir() if 'sandboxes' in each]").text == "[]"
    assert restored.info.metadata["snapshot"] == "my-setup"
    assert restored.info.metadata["not_restored"] == {"lines": "cannot pickle 'generator' object"}


@pytest.mark.slow
def test_what_has_no_room_beside_is_left_to_the_service(service: DatalayerService, create: Create) -> None:
    sandbox = create()
    code = "big = b'x' * 40_000_000\ndef size(): return len(big)\nclass A: pass\na, many = A(), [A()]"
    assert sandbox.run_code(code).success
    sandbox.create_snapshot("big")

    with pytest.warns(SandboxSnapshotWarning, match="many are missing"):
        restored = create(snapshot_name="big")

    assert restored.run_code("size(), type(a) is A").text == "(40000000, True)"
    assert restored.info.metadata["not_restored"] == {"many": "the service did not restore it"}


@pytest.mark.slow
def test_the_latest_of_a_name_is_meant(create: Create) -> None:
    sandbox = create()
    first, second = [
        (sandbox.run_code(f"x = {value}"), sandbox.create_snapshot("twice"))[1] for value in (1, 2)
    ]

    assert [each.id for each in sandbox.list_snapshots()] == [first.id, second.id]
    assert create(snapshot_name="twice").run_code("x").text == "2"
    assert create(snapshot_name=first.id).run_code("x").text == "1"
    sandbox.delete_snapshot("twice")
    assert [each.id for each in sandbox.list_snapshots()] == [first.id]
    with pytest.raises(SandboxSnapshotError, match=r"no snapshot 'other' at Datalayer \(known: 'twice'\)"):
        sandbox.delete_snapshot("other")


def test_an_unknown_snapshot_is_told_before_anything_is_asked_for(
    service: DatalayerService, create: Create
) -> None:
    with pytest.raises(SandboxSnapshotError, match=r"no snapshot 'mine' at Datalayer \(known: none\)"):
        create(snapshot_name="mine")
    assert posts(service) == []


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["no_snapshot", "accepted"])
def test_a_snapshot_may_be_there_only_later(service: DatalayerService, create: Create, answer: Any) -> None:
    service.knobs.snapshot_answer = answer
    service.knobs.snapshot_seconds = 1.0
    sandbox = create()
    sandbox.run_code("x = 1")
    snapshots = [sandbox.create_snapshot("later") for _ in range(2)]
    assert [each.id for each in sandbox.list_snapshots()] == [each.id for each in snapshots]
    assert create(snapshot_name="later").run_code("x").text == "1"


@pytest.mark.slow
def test_a_snapshot_of_somebody_else_has_plain_variables_only(
    service: DatalayerService, create: Create
) -> None:
    sandbox = create()
    sandbox.run_code("x = 1\ndef f(): pass")
    body = {"runtime_name": service.runtimes[0].name, "name": "theirs", "stop": False}
    url = f"{service.url}/api/runtimes/v1/sandbox-snapshots"
    headers = {"Authorization": f"Bearer {service.api_key}"}
    requests.post(url, json=body, headers=headers, timeout=60).raise_for_status()

    with pytest.warns(SandboxSnapshotWarning):
        restored = create(snapshot_name="theirs")

    assert restored.run_code("x").text == "1"
    assert list(restored.info.metadata["not_restored"]) == ["*"]  # type: ignore[call-overload]  # a mapping


@pytest.mark.slow
def test_a_snapshot_waits_for_the_end_of_a_run_and_other_contexts_are_named(create: Create) -> None:
    sandbox = create()
    other = sandbox.create_context("other")
    sandbox.run_code("y = 1", context=other)
    stream = iter(sandbox.run_code_streaming("print('on')\nimport time; time.sleep(1); x = 1"))
    next(stream)

    snapshot = sandbox.create_snapshot("mine")

    assert "x" in snapshot.variables
    assert snapshot.not_carried == {"other:*": "the service keeps the default context alone"}
    list(stream)
    with pytest.raises(RuntimeError, match="from inside a callback"):
        sandbox.run_code("print(1)", on_stdout=lambda _: sandbox.create_snapshot("inside"))


@pytest.mark.slow
def test_a_snapshot_that_is_not_made_is_told_and_the_sandbox_goes_on(
    service: DatalayerService, create: Create
) -> None:
    service.knobs.pre_warmed = False
    sandbox = create()
    with pytest.raises(SandboxSnapshotError, match=r"'mine' was not made: .* there is no pre-warmed kernel"):
        sandbox.create_snapshot("mine")
    assert sandbox.run_code("[each for each in dir() if 'sandboxes' in each]").text == "[]"
    with pytest.raises(ValueError, match="a snapshot cannot be named"):
        sandbox.create_snapshot("a/b")


@pytest.mark.slow
def test_packages_of_the_session_are_installed_again(
    service: DatalayerService, create: Create, tmp_path: Path
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "carried")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_QUIET": "1"}
    for place in ("one", "two", "three"):
        (tmp_path / place).mkdir()
        env = {**offline, "PYTHONPATH": str(tmp_path / place), "PIP_TARGET": str(tmp_path / place)}
        service.knobs.environments.append(Environment(f"{place}-env", place, env=env))
    sandbox = create(environment="one-env")
    assert sandbox.install_packages(["carried"]).success
    assert sandbox.run_code("import carried; carried.NAME").text == "'carried'"
    sandbox.create_snapshot("mine")

    assert create(snapshot_name="mine", environment="two-env").run_code("carried.NAME").text == "'carried'"
    for path in (tmp_path / "wheels").iterdir():
        path.unlink()
    with pytest.warns(SandboxSnapshotWarning, match="carried==1.0, carried are missing"):
        restored = create(snapshot_name="mine", environment="three-env")
    reasons = restored.info.metadata["not_restored"]
    assert "could not be installed" in reasons["carried==1.0"]  # type: ignore[index]  # a mapping
    assert "No module named 'carried'" in reasons["carried"]  # type: ignore[index]


# Secrets.


@pytest.mark.slow
def test_no_token_is_told_to_anybody(service: DatalayerService, create: Create, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    sandbox = create()
    (runtime,) = service.runtimes
    told = [repr(sandbox), repr(sandbox.info), repr(sandbox._core.variant.metadata), sandbox.id]
    told += [repr(sandbox._core.variant._runtime), repr(sandbox._core.variant._datalayer)]  # type: ignore[attr-defined]
    told += [repr(Sandbox.list("datalayer-runtime"))]
    processes = "\n".join(command_of(process) for process in psutil.process_iter())
    failures = []
    service.knobs.error_shape = "html"
    for attempt in (
        lambda: Sandbox.from_id("runtime-0", run_url=service.url, token=service.api_key),
        lambda: create(environment="nowhere"),
        lambda: Sandbox.list_environments("datalayer-runtime", run_url=service.url, token="wrong-token"),
        lambda: Sandbox.list_environments(
            "datalayer-runtime", run_url="http://127.0.0.1:9", token="wrong-token"
        ),
    ):
        with pytest.raises(SandboxError) as raised:
            attempt()
        failures.append("".join(traceback.format_exception(raised.value)))
    service.expire(runtime.name)
    failures.append(str(sandbox.run_code("1").error))

    for token in (service.api_key, runtime.token, "wrong-token"):
        for text in (*told, *failures, processes, service.log, caplog.text):
            assert token not in re.sub(r"token=\"wrong-token\"", "", text)
    assert all(record.scheme in ("Bearer", "token") for record in service.requests)
