"""Serve the kernels of a container as a Jupyter Server, on a socket that listens already.

Run as ``python server.py <descriptor> <folder of connection files> <root folder>``. Kernels that are in the
folder are the server's "external" ones: it serves them, and ends none of them.
"""

from __future__ import annotations

import socket
import sys


def main(descriptor: int, kernels: str, root: str) -> None:
    from jupyter_server.serverapp import ServerApp

    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)
    listener.set_inheritable(False)

    class Server(ServerApp):
        def _bind_http_server(self) -> None:
            self.http_server.add_socket(listener)

    Server.launch_instance(
        [
            "--ServerApp.allow_external_kernels=True",
            f"--ServerApp.external_connection_dir={kernels}",
            f"--ServerApp.root_dir={root}",
            # Who can reach the socket may use the sandbox in any case.
            "--IdentityProvider.token=",
            "--ServerApp.password=",
            "--ServerApp.disable_check_xsrf=True",
            "--ServerApp.allow_root=True",
            "--ServerApp.open_browser=False",
            "--ServerApp.sock=listening",  # so that it looks for no port
            "--ZMQChannelsWebsocketConnection.limit_rate=False",  # which drops output
        ]
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
