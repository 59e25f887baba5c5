"""What runtimes can be made from."""

from __future__ import annotations

from tests.datalayer_service.answers import Answer, Json, Refusal, Request, success
from tests.datalayer_service.knobs import Environment, Knobs

__all__ = ["Environments"]


class Environments:
    """The registry."""

    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs

    def find(self, name: str) -> Environment:
        for environment in self._knobs.environments:
            if environment.name == name:
                return environment
        raise Refusal(404, f"Environment {name} not found")

    def list(self, request: Request) -> Answer:
        """All, or a page that begins at the `cursor`."""
        environments = self._knobs.environments
        first = _number(request.query.get("cursor"), 0)
        size = _number(request.query.get("limit"), len(environments))
        size = min(size, self._knobs.page_size or size)
        told = [_told(environment) for environment in environments[first : first + size]]
        if first + size < len(environments):
            return success({"environments": told, "nextCursor": str(first + size)})
        return success({"environments": told})


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default


def _told(environment: Environment) -> Json:
    resources: Json = {"cpu": "1", "memory": "2Gi"}
    if environment.gpus:
        resources["nvidia.com/gpu"] = str(environment.gpus)
    return {
        "name": environment.name,
        "title": environment.title,
        "description": f"<b>{environment.title}</b>, made up for tests.",
        "owner": "datalayer" if environment.origin == "platform" else "ada",
        "origin": environment.origin,
        "visibility": "public" if environment.origin == "platform" else "private",
        "language": "python",
        "burning_rate": environment.burning_rate,
        "dockerImage": environment.docker_image,
        "resources": resources,
        "env": [{"name": name, "value": value} for name, value in environment.env.items()] or None,
        "capabilities": None,
        "example": None,
        "icon": None,
        "tags": None,
        "snippets": None,
        "contents": None,
        "home": None,
    }
