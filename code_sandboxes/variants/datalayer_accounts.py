"""Where Datalayer's services are, and who asks them: by options, the environment, and Datalayer's own file.

The file is ``~/.datalayer/config.json``, which its command-line program writes; there are no secrets in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from code_sandboxes.checks import check_str
from code_sandboxes.errors import SandboxAuthenticationError, SandboxConfigurationError
from code_sandboxes.remote.datalayer import Datalayer
from code_sandboxes.remote.rest import Place

__all__ = ["Account", "account_of", "known_account"]

_KEY, _RUN_URL = "DATALAYER_API_KEY", "DATALAYER_RUN_URL"

# Of each service: the variable for it alone, its name in the file, and where it is if nobody says.
_IAM = ("DATALAYER_IAM_URL", "iam_url", "https://prod1.datalayer.run")
_RUNTIMES = ("DATALAYER_RUNTIMES_URL", "runtimes_url", "https://r1.datalayer.run")

_FILE = Path(".datalayer", "config.json")


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks, and where.

    Args:
        iam: the URL of the service for accounts.
        runtimes: that of the one for runtimes.
    """

    iam: str
    runtimes: str
    token: str = field(repr=False)

    def open(self) -> Datalayer:
        """What asks the services for it; to be closed."""
        return Datalayer(Place(self.iam, "iam_url"), Place(self.runtimes, "runtimes_url"), self.token)


def account_of(options: Mapping[str, object]) -> Account:
    """The account that *options* (``token``, ``run_url``) and the environment mean.

    Raises:
        SandboxAuthenticationError: there is no API key.
        SandboxConfigurationError: a URL is none.
    """
    account = known_account(options)
    if account is None:
        raise SandboxAuthenticationError(
            f"Datalayer wants to know who is asking, and there is no API key: pass token=, or set {_KEY}"
        )
    return account


def known_account(options: Mapping[str, object] | None = None) -> Account | None:
    """The same; None if there is no API key."""
    given = {name: (options or {}).get(name) for name in ("run_url", "token")}
    for name, value in given.items():
        check_str(name, value)
    token = given["token"] or os.environ.get(_KEY)
    if not token:
        return None
    if not str(token).isascii() or not str(token).isprintable():  # it goes into a header
        raise SandboxConfigurationError("the API key for Datalayer has characters that no API key has")
    run_url = given["run_url"]
    return Account(_url(_IAM, run_url), _url(_RUNTIMES, run_url), str(token))


def _url(service: tuple[str, str, str], run_url: object) -> str:
    """Where a service is, always in the same spelling.

    Raises:
        SandboxConfigurationError: it is told, and is no URL.
    """
    variable, key, default = service
    if run_url:
        return Place(str(run_url), "run_url").url
    for name in (variable, _RUN_URL):
        if url := os.environ.get(name):
            return Place(url, name).url
    url = _of_file(key)
    return default if url is None else Place(url, f"{key} in ~/{_FILE}").url


def _of_file(key: str) -> str | None:
    try:
        told = json.loads((Path.home() / _FILE).read_bytes())
    except (OSError, ValueError, RuntimeError):  # there is none, or nobody is at home
        return None
    value = told.get(key) if isinstance(told, dict) else None
    return value if isinstance(value, str) and value else None
