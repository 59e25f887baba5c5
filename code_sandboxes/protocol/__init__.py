"""The Jupyter messaging protocol, sans I/O: no socket, clock, thread, asyncio or zmq in this package."""
