from __future__ import annotations

import pytest

from tests.scripted import ScriptedClient, ScriptedKernel, ScriptedRun


@pytest.fixture
def kernel() -> ScriptedKernel:
    return ScriptedKernel()


@pytest.fixture
def client() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def run(client: ScriptedClient) -> ScriptedRun:
    return client.executes()
