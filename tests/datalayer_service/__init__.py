"""The Datalayer cloud on this machine: its REST services, and a Jupyter Server for each runtime.

    with DatalayerService() as cloud:
        ...  # DATALAYER_RUN_URL=cloud.url DATALAYER_API_KEY=cloud.api_key

What it does is what clients, recordings and documentation of the cloud tell; where they differ, or the
cloud's behaviour is not known, a knob says which way it is. Faults are asked for: `Knobs` for the answers,
`Faults` for websockets.
"""

from tests.datalayer_service.answers import Json
from tests.datalayer_service.knobs import CreateFault, Environment, Knobs
from tests.datalayer_service.ledger import Entry, Ledger, Reservation
from tests.datalayer_service.records import Record
from tests.datalayer_service.runtimes import Runtime
from tests.datalayer_service.service import DatalayerService
from tests.datalayer_service.snapshots import Snapshot
from tests.datalayer_service.websockets import Faults

__all__ = [
    "CreateFault",
    "DatalayerService",
    "Entry",
    "Environment",
    "Faults",
    "Json",
    "Knobs",
    "Ledger",
    "Record",
    "Reservation",
    "Runtime",
    "Snapshot",
]
