"""Start ipykernel without what a sandbox does not need, and with output that is neither late nor lost.

Run as a script, in place of ``-m ipykernel_launcher``, by whatever Python the kernelspec names. Each change
is guarded: on an ipykernel that does not have what it changes, that version's own behaviour stays.
"""

from __future__ import annotations

import _thread
import builtins
import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from types import CodeType, FrameType, ModuleType
from typing import Any, cast

PRIVATE = "_code_sandboxes_"

# Seconds that ipykernel waits for more text before it publishes; 0.2 by default.
FLUSH_INTERVAL = 0.005

# Characters of text in one message: whoever reads it has a limit, and a long print is to arrive whole.
LONGEST_TEXT = 1024 * 1024


def import_kernelapp() -> ModuleType:
    """The module :mod:`ipykernel.kernelapp`, imported without debugpy: 55 ms that nobody uses here."""
    gc.disable()
    blocked = "debugpy" not in sys.modules
    if blocked:
        # None is what makes an import fail (Python reference, section "The module cache").
        sys.modules["debugpy"] = cast(ModuleType, None)
    try:
        import ipykernel.debugger  # noqa: F401  (it is imported now so that it finds no debugpy)
        from ipykernel import kernelapp
    finally:
        if blocked:  # the user's own code may import it
            sys.modules.pop("debugpy", None)
        gc.enable()
    return kernelapp


def descriptors_of(connection_file: str) -> dict[str, Any]:
    """What a connection file says of descriptors that were handed over; empty if it says nothing."""
    if not connection_file.startswith("/proc/self/fd/"):
        return {}
    with open(connection_file) as file:
        content: dict[str, Any] = json.load(file)
    return content


def listen_on(application: Any, connection: dict[str, Any]) -> None:
    """Let the kernel use sockets that listen already (zmq_setsockopt(3), ZMQ_USE_FD)."""
    import zmq
    from ipykernel.heartbeat import Heartbeat

    descriptors = {connection[f"{name}_port"]: fd for name, fd in connection["sockets"].items()}
    for fd in descriptors.values():
        os.set_inheritable(fd, False)

    def bind(socket: Any, port: int) -> int:
        socket.setsockopt(zmq.USE_FD, descriptors[port])
        socket.bind(f"ipc://{connection['ip']}-{port}")
        return port

    heartbeat: Any = Heartbeat
    application._try_bind_socket = lambda self, socket, port: bind(socket, port)
    heartbeat._try_bind_socket = lambda self: bind(self.socket, self.port)


def publish_sooner(record: Callable[[int, str], None] | None) -> None:
    """Make a print arrive within milliseconds, the end of a cell without empty flushes, and lose nothing."""
    from ipykernel.iostream import IOPubThread, OutStream

    if hasattr(OutStream, "flush_interval"):
        OutStream.flush_interval = FLUSH_INTERVAL
    if all(hasattr(OutStream, name) for name in ("flush", "_flush", "write", "_schedule_flush")):
        skip_empty_flushes(OutStream)
        write_faster(OutStream, record)
        if all(hasattr(OutStream, name) for name in ("_watch_pipe_fd", "_setup_stream_redirects")):
            take_before_flushing(OutStream)
        if hasattr(OutStream, "_flush_buffers"):
            publish_in_pieces(OutStream)
        if record is not None and hasattr(IOPubThread, "_handle_pipe_msg"):
            record_children(record)


def skip_empty_flushes(out_stream: Any) -> None:
    """Let ``flush()`` return at once when there is nothing to flush.

    ipykernel flushes four times for each cell, each time waiting for another thread (0.6 ms in all).
    Nothing is to flush when nothing was written since the last flush *ended*: one that is still going on
    has emptied the buffers, but may not have handed over what was in them, and must not be overtaken.
    """
    flush, send = out_stream.flush, out_stream._flush

    def flush_if_needed(self: Any) -> None:
        if self._buffers or getattr(self, "_sending", 0):
            flush(self)

    def counted_send(self: Any) -> None:
        self._sending = getattr(self, "_sending", 0) + 1
        try:
            send(self)
        finally:
            self._sending -= 1

    out_stream.flush, out_stream._flush = flush_if_needed, counted_send


def write_faster(out_stream: Any, record: Callable[[int, str], None] | None) -> None:
    """Replace ``OutStream.write()`` by one that also records, and is no slower for it.

    The original hashes the header of the running request at every call, to find the buffer for it; here the
    buffer is found again as long as neither the header nor the set of buffers is another object.
    """

    def write(self: Any, string: str) -> int | None:
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string)}")
        in_child = os.getpid() != self._master_pid
        if in_child or self.echo is not None or self.pub_thread is None:
            written: int | None = original(self, string)  # a forked child writes through its parent
            return written
        text = string if string.isascii() else publishable(string)
        parent = self.parent_header
        with self._buffer_lock:
            if self.__dict__.get("_for") != (id(parent), id(self._buffers)):
                self._buffer = self._buffers[frozenset(parent.items())]
                # Both are kept alive with it, so that no other object can have their id.
                self._for, self._kept = (id(parent), id(self._buffers)), (parent, self._buffers)
            self._buffer.write(text)
            if record is not None:
                record(self.name == "stderr", text)
        self._schedule_flush()
        return len(string)

    original = out_stream.write
    out_stream.write = write


def take_before_flushing(out_stream: Any) -> None:
    """Let ``flush()`` publish, too, what was written to the descriptor itself, by whatever process.

    It comes through a pipe that a thread reads. A cell can end before that thread has had its turn, and what
    is published later belongs to no run. So whoever flushes takes what is in the pipe; the thread only
    sees to it that nothing stays there, and that a character may come in two pieces.
    """
    import codecs
    import fcntl
    import select
    from termios import FIONREAD

    set_up, flush = out_stream._setup_stream_redirects, out_stream.flush

    def be_ready_to_take(self: Any) -> None:
        self._taking = threading.Lock()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def set_up_to_take(self: Any, name: str) -> None:
        be_ready_to_take(self)
        set_up(self, name)

    def take(self: Any) -> None:
        with self._taking:
            waiting = int.from_bytes(fcntl.ioctl(self._fid, FIONREAD, bytes(4)), sys.byteorder)
            if not waiting:
                return
            data = os.read(self._fid, waiting)
            self.write(self._decode(data))
        os.write(self._original_stdstream_copy, data)

    def watch(self: Any) -> None:
        poll = select.poll()
        poll.register(self._fid, select.POLLIN)
        try:
            while self._should_watch and poll.poll()[0][1] & select.POLLIN:
                take(self)
        except Exception:
            self._exc = sys.exc_info()  # as the original does: close() tells it

    def take_and_flush(self: Any) -> None:
        if self._fid is not None and os.getpid() == self._master_pid:
            with contextlib.suppress(OSError):  # of code that closes descriptors that are not its own
                take(self)
        flush(self)

    for stream in (sys.stdout, sys.stderr):  # of a kernel that is up already
        if isinstance(stream, out_stream) and getattr(stream, "_fid", None) is not None:
            be_ready_to_take(stream)
            let_watch(stream, watch)
    out_stream._setup_stream_redirects, out_stream._watch_pipe_fd = set_up_to_take, watch
    out_stream.flush = take_and_flush


def let_watch(stream: Any, watch: Callable[[Any], None]) -> None:
    """Let *watch* read what the thread of *stream* has read so far."""
    stream._should_watch = False
    os.write(stream._original_stdstream_fd, b"\0")  # it waits for something to read
    stream.watch_fd_thread.join(1.0)
    stream._should_watch = True
    stream.watch_fd_thread = threading.Thread(target=watch, args=(stream,), daemon=True)
    stream.watch_fd_thread.start()


def publish_in_pieces(out_stream: Any) -> None:
    """Cut long text into several messages."""
    flush_buffers = out_stream._flush_buffers

    def flush_pieces(self: Any) -> Iterator[tuple[Any, str]]:
        for parent, text in flush_buffers(self):
            for start in range(0, len(text), LONGEST_TEXT):
                yield parent, text[start : start + LONGEST_TEXT]

    out_stream._flush_buffers = flush_pieces


def publishable(text: str) -> str:
    """*text* as it can be published: bytes that were no UTF-8 as U+FFFD, any other lone surrogate as ``?``.

    ipykernel drops a message whole, and all that is printed with it, if there is such a one in it.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")


def publish_everything(application: Any) -> None:
    """Let messages wait in the kernel, however many: by default libzmq drops them beyond 1,000."""
    init_iopub = application.init_iopub

    def init_iopub_without_limit(self: Any, context: Any) -> None:
        context.sndhwm = 0  # for the sockets that are made from now on
        init_iopub(self, context)

    application.init_iopub = init_iopub_without_limit


def survive_interrupts(application: Any) -> None:
    """Let the kernel's event loop go on when an interrupt reaches it instead of the code.

    One that comes as a cell ends can be raised between ipykernel's own lines; it then leaves the event loop,
    and ipykernel takes that for the end of the kernel.
    """
    start = application.start

    def start_to_stay(self: Any) -> None:
        from tornado.ioloop import IOLoop

        loop: Any = IOLoop.current()
        run = loop.start

        def run_on() -> None:
            while True:
                try:
                    run()
                    return
                except KeyboardInterrupt:
                    continue

        loop.start = run_on
        start(self)

    application.start = start_to_stay


def interrupt_only_code(kernelbase: Any) -> None:
    """Raise an interrupt in the user's code, never in the lines of IPython around it, and do not lose it.

    There it can leave IPython's traps half set, and all later cells without a result; and what is raised in
    a callback of the interpreter's own (``__del__()``, a weak reference) is dropped. Such an interrupt comes
    again a moment later, until it meets the code or the request is over: as SIGURG, which is ignored where
    nobody waits for it, so that no SIGINT can reach a later request.
    """
    request = 0
    wanted: int | None = None  # the request that is to be interrupted
    main_thread = _thread.get_ident()
    hook_before, hook_after = kernelbase.Kernel.pre_handler_hook, kernelbase.Kernel.post_handler_hook
    report = sys.unraisablehook

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal wanted
        wanted = request
        interrupt_if_wanted(signum, frame)

    def interrupt_if_wanted(signum: int, frame: FrameType | None) -> None:
        nonlocal wanted
        if wanted != request:
            return
        if not is_of_code(frame):
            _thread.start_new_thread(come_again, (request,))
            return
        wanted = None
        raise KeyboardInterrupt

    def come_again(meant_for: int) -> None:
        time.sleep(0.001)
        if meant_for == request:
            # Where another thread received it, the one that runs the code would not be told to look.
            signal.pthread_kill(main_thread, signal.SIGURG)

    def report_or_come_again(unraisable: Any) -> None:
        nonlocal wanted
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            wanted = request
            _thread.start_new_thread(come_again, (request,))
        else:
            report(unraisable)

    def before(self: Any) -> None:
        nonlocal request
        if _thread.get_ident() == main_thread:  # a subshell has one of its own, where nothing is interrupted
            request += 1
            hook_before(self)

    def after(self: Any) -> None:
        nonlocal request
        if _thread.get_ident() == main_thread:
            request += 1
            hook_after(self)

    kernelbase.default_int_handler = interrupt
    kernelbase.Kernel.pre_handler_hook, kernelbase.Kernel.post_handler_hook = before, after
    sys.unraisablehook = report_or_come_again
    signal.signal(signal.SIGURG, interrupt_if_wanted)


def is_of_code(frame: FrameType | None) -> bool:
    """Does *frame*, or one that called it, work on the user's variables?"""
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    variables = None if shell is None else shell.user_module.__dict__
    while frame is not None and frame.f_globals is not variables:
        frame = frame.f_back
    return frame is not None


def ignore_interrupts_here_only(application: Any) -> None:
    """Let what is started between two cells, a command, react to SIGINT: what is ignored is inherited."""

    def init_signal(self: Any) -> None:
        signal.signal(signal.SIGINT, do_nothing)

    application.init_signal = init_signal


def do_nothing(signum: int, frame: FrameType | None) -> None:
    """What a signal does that is heeded while code runs only."""


def keep_json(copy: Callable[[str, dict[str, Any]], ModuleType]) -> None:
    """Let the kernel's messages not depend on what the user's code does to :mod:`json`.

    Args:
        copy: of ``apart.py``.
    """
    own = copy("json", dict(vars(builtins)))
    for name in ("jupyter_client.session", "zmq.utils.jsonapi", "ipykernel.subshell_manager"):
        module: Any = sys.modules.get(name)
        if getattr(module, "json", None) is json:
            module.json = own


def serve_guest(application: Any) -> None:
    """Load what serves files, commands and variables, before the user's code can change what that needs."""
    apart = load_sibling("apart")
    parts = apart.load(sibling_code)
    init_kernel = application.init_kernel

    def init_kernel_with_guest(self: Any) -> None:
        init_kernel(self)
        if hasattr(self.kernel, "comm_manager"):
            parts["comms"].install(self.kernel, parts)

    application.init_kernel = init_kernel_with_guest


def journal_of(connection_file: str, connection: dict[str, Any]) -> Callable[[int, str], None] | None:
    """Records in the journal that was handed over, or lies beside the connection file, if there is one."""
    path = os.path.join(os.path.dirname(connection_file), "journal")
    if "journal" in connection:
        fd = connection["journal"]
    elif os.path.exists(path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    else:
        return None
    try:
        record: Callable[[int, str], None] = load_sibling("journal").Journal(fd).record
    finally:
        os.close(fd)
    return record


def load_sibling(name: str) -> Any:
    """A module beside this file, under a name that no import of the user's can mean."""
    module = ModuleType(PRIVATE + name)
    exec(sibling_code(name), vars(module))
    return module


def sibling_code(name: str) -> CodeType:
    """The compiled source of a module beside this file; from Python's cache of those, if it is there."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    code = SourceFileLoader(PRIVATE + name, path).get_code(PRIVATE + name)
    assert code is not None
    return code


def exit_like_python() -> None:
    """Let ``exit(3)`` do what it does elsewhere: raise ``SystemExit(3)``, at once."""
    from IPython.core import autocall

    def leave(self: Any, code: Any = None) -> None:
        raise SystemExit(code)

    names = [name for name in ("ExitAutocall", "ZMQExitAutocall") if hasattr(autocall, name)]
    for name in names:
        each: Any = getattr(autocall, name)
        each.__call__ = leave


def publish_before_exit() -> None:
    """Let ``os._exit()`` wait until what the code has shown is on its way; the journal has only text."""
    leave, kernel = os._exit, os.getpid()

    def publish_and_exit(status: int) -> None:
        if os.getpid() == kernel:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # whatever they are by now, nothing may keep it
                    stream.flush()
            # Time for the threads that read pipes and write sockets: they cannot be asked.
            time.sleep(0.02)
        leave(status)

    setattr(os, "_exit", publish_and_exit)  # noqa: B010  (mypy: a function of another module)


def record_children(record: Callable[[int, str], None]) -> None:
    """Record, too, what forked children print: it comes through a pipe, and the kernel publishes it."""
    from ipykernel import iostream

    io_thread: Any = iostream.IOPubThread
    send, handle = io_thread.send_multipart, io_thread._handle_pipe_msg
    forwarding = threading.local()

    def recording_send(self: Any, message: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(forwarding, "now", False):
            record_message(record, message)
        send(self, message, *args, **kwargs)

    def forwarding_handle(self: Any, *args: Any) -> None:
        forwarding.now = True
        try:
            handle(self, *args)
        finally:
            forwarding.now = False

    io_thread.send_multipart = recording_send
    io_thread._handle_pipe_msg = forwarding_handle


def record_message(record: Callable[[int, str], None], frames: list[bytes]) -> None:
    """Record the text of a ``stream`` message."""
    parts = frames[frames.index(b"<IDS|MSG>") + 2 :]
    if json.loads(parts[0]).get("msg_type") == "stream":
        content = json.loads(parts[3].decode("utf-8", "replace"))
        record(content["name"] == "stderr", content["text"])


def report_crashes() -> None:
    """Let a crash of the interpreter say where, on the standard error that the host reads.

    ipykernel replaces that descriptor by a pipe to itself, in which the last words of the process are lost.
    """
    faulthandler.enable(os.dup(2))


def run_without_terminals() -> None:
    """Let ``!command`` work where no pseudo-terminal is to be had, as under Landlock."""
    try:
        for fd in os.openpty():
            os.close(fd)
    except OSError:
        from ipykernel import zmqshell

        shell: Any = getattr(zmqshell, "ZMQInteractiveShell", None)
        if hasattr(shell, "system_raw"):
            shell.system = shell.system_raw


def use_own_packages() -> None:
    """Where the installation cannot be changed, let packages be installed elsewhere, and be found there.

    They come before those of the installation, for whatever is started from here, too.
    """
    prefix = os.environ.get("CODE_SANDBOXES_PACKAGES")
    if not prefix:
        return
    # As pip decides it for ``--prefix`` (Python documentation, sysconfig, "Installation paths").
    preferred = getattr(sysconfig, "get_preferred_scheme", lambda key: "posix_prefix")
    places = {"base": prefix, "platbase": prefix}
    paths = sysconfig.get_paths(preferred("prefix"), vars=places)
    folders = list(dict.fromkeys((paths["purelib"], paths["platlib"])))
    for folder in folders:
        os.makedirs(folder, exist_ok=True)  # what is not there when it is first looked for is not seen later
    before = [i for i, path in enumerate(sys.path) if path.endswith(("site-packages", "dist-packages"))]
    at = min(before, default=len(sys.path))
    sys.path[at:at] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


def improve(kernel: Any, copy: Callable[[str, dict[str, Any]], ModuleType]) -> None:
    """Change what can be changed in a kernel that is up already, of all that :func:`main` changes.

    Args:
        kernel: which answers a request just now.
        copy: of ``apart.py``.
    """
    from ipykernel import kernelbase

    warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning)
    publish_before_exit()
    exit_like_python()
    run_without_terminals()
    keep_json(copy)
    if can_interrupt_only_code(kernelbase) and threading.current_thread() is threading.main_thread():
        interrupt_only_code(kernelbase)
        kernel.saved_sigint_handler = do_nothing  # what is put in place after the request
    publish_sooner(None)
    for stream in (sys.stdout, sys.stderr):  # what IPython has put back after a cell was their old one
        vars(stream).pop("write", None)


def can_interrupt_only_code(kernelbase: Any) -> bool:
    hooks = all(hasattr(kernelbase.Kernel, f"{when}_handler_hook") for when in ("pre", "post"))
    return hooks and hasattr(signal, "SIGURG")


def main() -> None:
    """Start the kernel; returns when it ends."""
    # The folder of this script is no place for the user's imports to find anything.
    sys.path[:] = sys.path[1:]
    use_own_packages()
    # sys.exit() is an outcome here, told as such; IPython's advice on how to leave a terminal is noise.
    warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning)
    report_crashes()
    publish_before_exit()
    kernelapp = import_kernelapp()
    exit_like_python()
    run_without_terminals()
    keep_json(load_sibling("apart").copy)
    survive_interrupts(kernelapp.IPKernelApp)
    from ipykernel import kernelbase

    if can_interrupt_only_code(kernelbase):
        interrupt_only_code(kernelbase)
    if hasattr(kernelapp.IPKernelApp, "init_iopub"):
        publish_everything(kernelapp.IPKernelApp)
    if hasattr(kernelapp.IPKernelApp, "init_signal"):
        ignore_interrupts_here_only(kernelapp.IPKernelApp)
    if hasattr(kernelapp.IPKernelApp, "init_kernel"):
        serve_guest(kernelapp.IPKernelApp)
    connection_file = sys.argv[sys.argv.index("-f") + 1] if "-f" in sys.argv[:-1] else ""
    connection = descriptors_of(connection_file)
    if connection:
        listen_on(kernelapp.IPKernelApp, connection)
    publish_sooner(journal_of(connection_file, connection))
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
