"""Many threads, many sandboxes, many runs: nothing mixed, nothing grows."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from code_sandboxes import OutputMessage, Sandbox
from conftest import UNISOLATED, MakeSandbox, open_descriptors

IN_A_CONTAINER = True


@pytest.mark.slow
def test_50_threads_on_one_sandbox_get_each_their_own_output(sandbox: Sandbox) -> None:
    def run(i: int) -> None:
        heard: list[str] = []
        result = sandbox.run_code(
            f"print('a{i}')\nimport time; time.sleep(0.002)\nprint('b{i}')\n{i}",
            on_stdout=lambda m: heard.append(m.line),
        )
        assert (result.status, result.stdout, result.text) == ("ok", f"a{i}\nb{i}", str(i))
        assert heard == [f"a{i}", f"b{i}"]

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(run, range(200)))


@pytest.mark.slow
def test_runs_on_one_context_queue_in_the_order_of_their_calls(sandbox: Sandbox) -> None:
    sandbox.run_code("order = []")
    streams = [sandbox.run_code_streaming(f"order.append({i})") for i in range(20)]
    first = threading.Event()
    blocker = threading.Thread(
        target=sandbox.run_code,
        args=("print(1)\nimport time; time.sleep(0.5)",),
        kwargs={"on_stdout": lambda _: first.set()},
    )
    blocker.start()
    first.wait(30)
    threads = []
    for stream in streams:
        begun = threading.Event()
        thread = threading.Thread(target=lambda s=stream, b=begun: (b.set(), list(s)))
        thread.start()
        begun.wait(30)
        # The call itself is quick; what is measured is that the queue keeps the order of arrival.
        thread.join(0.005)
        threads.append(thread)
    for thread in [blocker, *threads]:
        thread.join(30)

    assert sandbox.run_code("order == sorted(order), len(order)").text == "(True, 20)"


@pytest.mark.not_in_a_container("so many take minutes; ten are enough in test_docker.py")
@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_50_sandboxes_in_one_process_do_not_mix_and_need_few_threads_and_descriptors(
    make_sandbox: MakeSandbox,
) -> None:
    make_sandbox()
    descriptors, threads = open_descriptors(), threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        sandboxes = list(pool.map(lambda _: make_sandbox(), range(50)))
        per_sandbox = (open_descriptors() - descriptors) / 50
        in_pool = len(pool._threads)
        assert threading.active_count() - in_pool <= threads  # some of earlier tests may end only now
        assert per_sandbox <= 8

    def run(i: int) -> None:
        heard: list[OutputMessage] = []
        result = sandboxes[i].run_code(f"x = {i}\nfor n in range(20): print(x)", on_stdout=heard.append)
        assert result.stdout.split() == [str(i)] * 20
        assert [m.line for m in heard] == [str(i)] * 20

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(run, range(50)))
        list(pool.map(lambda sandbox: sandbox.terminate(), sandboxes))
    assert open_descriptors() <= descriptors


# In a process of its own: the memory of this one tells more of the tests before.
GROWTH = """
import gc, json, os, sys, threading, time
import psutil
from code_sandboxes import Sandbox

def measure():
    while any(thread.name == "code_sandboxes-apart" for thread in threading.enumerate()):
        time.sleep(0.01)  # what it does for the latest end is soon over
    gc.collect()
    rss = psutil.Process().memory_info().rss
    return len(os.listdir("/dev/fd")), threading.active_count(), rss

def create():
    return Sandbox.create(**json.loads(sys.argv[1]))

def runs(sandbox, count):
    for i in range(count):
        code = f"print({i})\\nfrom IPython.display import display\\nh = display({i}, display_id=True)\\n{i}"
        assert sandbox.run_code(code).text == str(i)

def come_and_go(count):
    for _ in range(count):
        with create() as sandbox:
            assert sandbox.run_code("1 + 1").text == "2"

def grow(work, warm_up, count):
    work(warm_up)
    before = measure()
    work(count)
    print(json.dumps([after - before for before, after in zip(before, measure())]))
"""


def _growth(program: str, variant: str) -> tuple[int, int, int]:
    """Descriptors, threads and bytes that *program* has more of at its end."""
    settings = json.dumps({"variant": variant, **UNISOLATED.get(variant, {})})
    command = [sys.executable, "-c", GROWTH + program, settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    descriptors, threads, size = json.loads(done.stdout)
    return descriptors, threads, size


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "with create() as s: grow(lambda n: runs(s, n), 200, 1000)",
        "grow(come_and_go, 10, 40)",
    ],
    ids=["1,000 runs", "40 sandboxes"],
)
def test_nothing_grows(runtime_folder: Path, program: str, variant: str) -> None:
    descriptors, threads, size = _growth(program, variant)

    assert (descriptors, threads) == (0, 0)
    assert size < 2 * 1024**2
