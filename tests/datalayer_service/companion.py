"""What runs beside a kernel in its pod: it evaluates an expression in it, as a client of the kernel."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.datalayer_service import kernel_code

__all__ = ["KernelUnavailableError", "call", "evaluate"]


class KernelUnavailableError(Exception):
    """There is none, or it did not come to it in time."""


def evaluate(connection_file: Path, expression: str, patience: float) -> object:
    """The value of *expression*, which may be any literal; it leaves no name, nor a trace in the history."""
    if not connection_file.exists():
        raise KernelUnavailableError("there is no pre-warmed kernel")
    return asyncio.run(_evaluate(connection_file, expression, patience))


def call(connection_file: Path, function: str, arguments: str, patience: float) -> object:
    """What a *function* of `kernel_code` returns there, for the user's namespace and further *arguments*."""
    source = Path(kernel_code.__file__).read_text(encoding="utf-8")
    run = f"__import__('builtins').exec({source!r}, here)"
    answer = f"here[{function!r}](vars(__import__('__main__')), {arguments})"
    return evaluate(connection_file, f"(lambda here: {run} or {answer})({{}})", patience)


async def _evaluate(connection_file: Path, expression: str, patience: float) -> object:
    context = zmq.asyncio.Context()
    client = AsyncKernelClient(context=context, connection_file=str(connection_file))
    client.load_connection_file()
    # Only the reply is wanted. The kernel need not be up yet: it finds the request when it is.
    client.start_channels(iopub=False, stdin=False, hb=False, control=False)
    try:
        asked = client.execute("", silent=True, user_expressions={"answer": expression})
        reply = await asyncio.wait_for(_reply(client, asked), patience)
    except asyncio.TimeoutError as error:
        raise KernelUnavailableError(f"the kernel did not answer in {patience:g} s") from error
    finally:
        client.stop_channels()
        context.destroy(linger=0)
    return _value(reply)


async def _reply(client: AsyncKernelClient, asked: str) -> dict[str, object]:
    while True:
        reply = await client.get_shell_msg()
        if reply["parent_header"].get("msg_id") == asked:
            content: dict[str, object] = reply["content"]
            return content


def _value(reply: dict[str, object]) -> object:
    expressions = reply.get("user_expressions")
    answer = expressions.get("answer") if isinstance(expressions, dict) else None
    if not isinstance(answer, dict) or answer.get("status") != "ok":
        raise RuntimeError(f"the companion's code failed: {answer or reply}")
    return ast.literal_eval(answer["data"]["text/plain"])
