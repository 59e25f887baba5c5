"""Run the service by hand: ``python -m tests.datalayer_service [--port P]``."""

from __future__ import annotations

import argparse
import signal
import threading

from tests.datalayer_service.service import DatalayerService


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.datalayer_service", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="a free one by default")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with DatalayerService(port=options.port) as service:
        print(f"export DATALAYER_RUN_URL={service.url}")
        print(f"export DATALAYER_API_KEY={service.api_key}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
