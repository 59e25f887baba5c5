"""The service as a whole."""

from __future__ import annotations

import atexit
from types import TracebackType

from tests.datalayer_service.api import Api, routes
from tests.datalayer_service.creation import Creation
from tests.datalayer_service.environments import Environments
from tests.datalayer_service.ground import Ground
from tests.datalayer_service.iam import Iam, Secrets, new_api_key
from tests.datalayer_service.ingress import Ingress
from tests.datalayer_service.knobs import Knobs
from tests.datalayer_service.ledger import Ledger
from tests.datalayer_service.records import Record, Records
from tests.datalayer_service.runtimes import Runtime, Runtimes
from tests.datalayer_service.runtimes_api import RuntimesApi
from tests.datalayer_service.server import Server
from tests.datalayer_service.snapshots import Shelf, Snapshot, SnapshotsApi
from tests.datalayer_service.websockets import Faults

__all__ = ["DatalayerService"]


class DatalayerService:
    """Runs from its creation until `close`, or the end of the process, whatever that end is."""

    def __init__(self, knobs: Knobs | None = None, *, port: int = 0, api_key: str | None = None) -> None:
        self.knobs = knobs or Knobs()
        self.api_key = api_key or new_api_key()
        self.faults = Faults()
        self.ledger = Ledger(self.knobs)
        self.secrets = Secrets()
        self._records = Records()
        self._shelf = Shelf()
        self._server = Server(port)
        self._ground = Ground()
        self._is_closed = False
        self._assemble()
        self._server.start()
        atexit.register(self.close)

    def __enter__(self) -> DatalayerService:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """What DATALAYER_RUN_URL is."""
        return self._server.origin

    @property
    def runtimes(self) -> list[Runtime]:
        """Those that exist now."""
        return self._runtimes.all

    @property
    def snapshots(self) -> list[Snapshot]:
        return self._shelf.all

    @property
    def requests(self) -> list[Record]:
        """What was asked, in the order of the answers."""
        return self._records.all

    @property
    def log(self) -> str:
        """The access log."""
        return self._records.log

    def requests_to(self, method: str, path: str) -> list[Record]:
        """Those to the control plane whose path ends in *path*: ``requests_to("POST", "/runtimes")``."""
        return [
            record
            for record in self.requests
            if record.method == method and record.path.startswith("/api/") and record.path.endswith(path)
        ]

    def runtime(self, name: str) -> Runtime:
        """The one of that name."""
        return self._runtimes.get(name)

    def expire(self, name: str) -> None:
        """End a runtime as if its time were up."""
        self._runtimes.end(self.runtime(name).name)

    def close(self) -> None:
        """End everything: no process, folder or thread is left."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        try:
            self._runtimes.close()
            self.faults.close_all()
            self._server.close()
            self._creation.close()
            self._snapshots_api.close()
        finally:
            self._ground.close()

    def _assemble(self) -> None:
        knobs, origin = self.knobs, self._server.origin
        environments = Environments(knobs)
        self._runtimes = Runtimes(knobs, self.ledger, self.secrets, self._ground, self.faults.end)
        self._snapshots_api = SnapshotsApi(knobs, self._runtimes, self._shelf)
        runtimes_api = RuntimesApi(knobs, self._runtimes, self._snapshots_api.restore, origin)
        self._creation = Creation(
            knobs, environments, self._runtimes, self._shelf.variables, runtimes_api.told, origin
        )
        iam = Iam(self.ledger, self.secrets)
        known = routes(iam, environments, runtimes_api, self._creation, self._snapshots_api)
        self._server.api = Api(knobs, self.api_key, known)
        self._server.ingress = Ingress(knobs, self._runtimes, self.faults)
        self._server.knobs = knobs
        self._server.records = self._records
