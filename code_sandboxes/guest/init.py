"""The first process in an enclosure: starts kernels as the host asks, signals and reaps them, and reports.

Run as ``python -I -S init.py <control>``: by bubblewrap with a descriptor, by a container engine with the
path of a socket to connect to. Either leads to the host (``SOCK_SEQPACKET``). It has no use for the code in
the sandbox, and that code has no way to it: as the first process of its PID namespace no signal from within
can end it (pid_namespaces(7)), and nobody may look into its memory.
When the host hangs up, it ends, and with it every process in the namespace.

Each message is a JSON object, some with descriptors. From the host: ``configure`` (the first), ``start``,
``signal``, ``connect``, ``pause``, ``resume``. To the host: ``ready``, ``started``, ``ended``, ``connected``,
``paused``, ``resumed``, ``failed``.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

# Where the proxy of the host listens; nothing else can, as its socket stays open as long as the sandbox.
PROXY = ("127.0.0.1", 3128)

SHARED_MEMORY = "/dev/shm"

# Bytes of a message; what is longer comes as a descriptor.
LONGEST = 65536
MOST_DESCRIPTORS = 16

# Descriptors of a kernel, from its standard error on, in the order in which the host sends them.
FIRST_PLACE = 2

# Where no descriptor is in the way while they are put in their places.
ASIDE = 64

# Seconds that a process may take to become a kernel: any in the sandbox can hold it up (kill(2), SIGSTOP).
PATIENCE = 5.0

# What a process is that does nothing: stopped, traced, or dead (proc_pid_stat(5)).
STOPPED = ("T", "t", "Z", "X")

# Pseudo-terminals: there are 4096 for all on the machine (proc(5), /proc/sys/kernel/pty).
TERMINALS = 64

# What a user has is counted for all processes of that user, those on the host, too (namespaces(7), "The
# /proc/sys/user directory"): a part of what systems give them. The namespace is the one below this.
OF_A_USER = {"max_inotify_instances": 16, "max_inotify_watches": 16384, "max_user_namespaces": 1}

# The out-of-memory killer is to choose a kernel, not this process (proc(5), oom_score_adj).
OOM_SCORE = "300"


class Init:
    """What is started and how it ended, by the host's numbers."""

    def __init__(self, control: socket.socket, confine: Any) -> None:
        self.control = control
        self.confine = confine
        self.limits: dict[str, int] = {}
        self.kernels: dict[int, int] = {}  # number of the kernel, by its pid

    def serve(self) -> None:
        """Until the host hangs up."""
        woken, waker = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        self.reap()
        while True:
            for fd, _ in poll.poll():
                if fd == woken:
                    drain(woken)
                    self.reap()
                elif not self.receive():
                    return

    def receive(self) -> bool:
        message, descriptors = receive(self.control)
        if message is None:
            return False
        try:
            if "start" in message:
                self.start(message["start"], descriptors)
            elif "signal" in message:
                self.signal(message["signal"], message["number"])
            elif "connect" in message:
                self.connect(message["connect"], message["path"])
            elif "pause" in message:
                self.pause(message["pause"])
            elif "resume" in message:
                signal_all(signal.SIGCONT)
                send(self.control, {"resumed": message["resume"]})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def start(self, number: int, descriptors: list[int]) -> None:
        """Start a kernel; the first descriptor is a file that says how."""
        try:
            document = json.loads(read_all(descriptors[0]))
            for path, content in document["files"].items():
                write_private(path, content)
            pid = self.spawn(document, descriptors[1:])
        except OSError as error:
            self.fail(number, error)
            return
        self.kernels[pid] = number
        send(self.control, {"started": number, "pid": pid})

    def spawn(self, document: dict[str, Any], descriptors: list[int]) -> int:
        """
        Raises:
            OSError: it could not be started.
        """
        pid = -1
        read, write = os.pipe()  # which execve(2) closes, so that nothing in it means success
        try:
            pid = os.fork()
        except OSError:
            os.close(read)
            raise
        finally:
            if pid != 0:
                os.close(write)
        if pid == 0:
            become(document, descriptors, self.limits, self.confine, write, self.control.fileno())
        failure = self.hear(read)
        if failure is None:
            os.kill(pid, signal.SIGKILL)
            failure = json.dumps([errno.ETIME, document["argv"][0]]).encode()
        if failure:
            os.waitpid(pid, 0)
            raise error_in(failure)
        return pid

    def hear(self, read: int) -> bytes | None:
        """What a child says until it is a kernel; None if it takes too long, or the host has hung up."""
        poll = select.poll()
        poll.register(read, select.POLLIN)
        poll.register(self.control, 0)  # that it was hung up is told all the same
        try:
            heard = [fd for fd, _ in poll.poll(PATIENCE * 1000)]
            return os.read(read, LONGEST) if read in heard else None
        finally:
            os.close(read)

    def signal(self, number: int, what: int) -> None:
        for pid, kernel in self.kernels.items():
            if kernel == number:
                kill_group(pid, what)

    def connect(self, number: int, path: str) -> None:
        """Connect to a socket of the sandbox, for the host."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)  # one that nobody accepts must not keep everybody
            try:
                connection.connect(path)
            except OSError as error:
                self.fail(number, error)
                return
            send(self.control, {"connected": number}, [connection.fileno()])

    def pause(self, number: int) -> None:
        """Stop all that is here but this process."""
        try:
            stop_all()
        except OSError as error:
            signal_all(signal.SIGCONT)  # all or none
            self.fail(number, error)
        else:
            send(self.control, {"paused": number})

    def reap(self) -> None:
        """Tell the host of kernels that have ended; whatever else was left to this process just goes."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            number = self.kernels.pop(ended.si_pid, None)
            if number is not None:
                # While the dead leader still keeps the group's number from being used again.
                kill_group(ended.si_pid, signal.SIGKILL)
            os.waitpid(ended.si_pid, 0)
            if number is not None:
                exited = ended.si_code == os.CLD_EXITED
                status = ended.si_status if exited else -ended.si_status
                send(self.control, {"ended": number, "status": status})

    def fail(self, number: int, error: OSError) -> None:
        path = error.filename if isinstance(error.filename, str) else ""
        send(self.control, {"failed": number, "errno": error.errno, "path": path})


def become(
    document: dict[str, Any],
    descriptors: list[int],
    limits: dict[str, int],
    confine: Any,
    failure: int,
    control: int,
) -> None:
    """In the child: be the kernel. Does not return."""
    at = document["argv"][0]
    try:
        os.close(control)  # as long as nobody in the sandbox can steer this process
        os.setsid()
        failure = put_in_place(descriptors, failure)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # what is ignored is inherited
        confine.limit_resources(limits)
        confine.hide(False)  # as execve(2) does in a moment, or it could not write this
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(OOM_SCORE)
        at = document["cwd"]
        os.chdir(at)
        at = document["argv"][0]
        os.execvpe(at, document["argv"], document["env"])
    except OSError as error:
        os.write(failure, json.dumps([error.errno, at]).encode())
    except BaseException as error:  # nothing of this process may go on in the child
        os.write(failure, json.dumps([5, f"{at}: {error!r}"]).encode())
    finally:
        os._exit(127)


def error_in(failure: bytes) -> OSError:
    """What a child has said; others in the sandbox may have written in its place."""
    try:
        code, path = json.loads(failure)
        return OSError(int(code), os.strerror(int(code)), str(path))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return OSError(errno.EIO, "what started there did not say what it was to say")


def put_in_place(descriptors: list[int], failure: int) -> int:
    """Standard input and output to nowhere, *descriptors* from 2 on; where *failure* is now."""
    import fcntl

    failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, ASIDE)
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, ASIDE) for descriptor in descriptors]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for place, descriptor in enumerate(aside, start=FIRST_PLACE):
        os.dup2(descriptor, place)
    os.closerange(FIRST_PLACE + len(aside), ASIDE)
    return failure


def stop_all() -> None:
    """
    Raises:
        OSError: something does not stop.
    """
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        signal_all(signal.SIGSTOP)  # and again: one that was just being started may have been missed
        if all(state in STOPPED for state in states()):
            return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def signal_all(number: int) -> None:
    """Send a signal to all in this PID namespace but its first process, which this is (kill(2))."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:  # there is nobody
        return


def states() -> Iterator[str]:
    """Of all processes here but this one, as proc_pid_stat(5) has them."""
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    yield file.read().rpartition(b")")[2].split()[0].decode()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue


def kill_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # it has just ended, or is only about to lead one
        return


def write_private(path: str, content: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)


def read_all(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except BlockingIOError:
        return


def receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message, and the descriptors that came along; None at the end."""
    data, descriptors, _, _ = socket.recv_fds(control, LONGEST, MOST_DESCRIPTORS)
    return (json.loads(data), descriptors) if data else (None, descriptors)


def send(control: socket.socket, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
    try:
        socket.send_fds(control, [json.dumps(message).encode()], descriptors or [])
    except (BrokenPipeError, ConnectionResetError):  # the host is gone, and so is this in a moment
        return


def load_sibling(name: str) -> ModuleType:
    """A module beside this file; the folder is not on the path, where code could be meant by mistake."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    code = SourceFileLoader(name, path).get_code(name)
    assert code is not None
    module = ModuleType(name)
    exec(code, vars(module))
    return module


def check_mounted(target: str, identity: list[int]) -> None:
    """
    Raises:
        OSError: something else is there: who can write beside it may have put that in its place.
    """
    status = os.stat(target)
    if [status.st_dev, status.st_ino] != identity:
        raise OSError(errno.ESTALE, f"what is mounted at {target} was replaced since the sandbox was made")


def give(path: str, uid: int) -> None:
    """Let a folder belong to *uid*.

    Raises:
        OSError: it is none that was made for the sandbox.
    """
    made = {os.stat(folder).st_dev for folder in ("/", SHARED_MEMORY)}
    if os.stat(path).st_dev not in made:
        raise OSError(errno.EXDEV, f"{path} is none of the sandbox's own folders")
    os.chown(path, uid, uid)


def configure(config: dict[str, Any], confine: Any) -> socket.socket | None:
    """Be as little as a kernel needs; returns the socket for the proxy.

    Raises:
        OSError: something of it is not possible, so nothing may run here.
    """
    listener = None
    if config["proxy"]:
        listener = socket.create_server(PROXY, backlog=128)
    for target, identity in config["mounts"]:
        check_mounted(target, identity)
    os.umask(0o022)
    if config["in_container"]:
        be_contained(config, confine)
    else:
        be_enclosed(config, confine)
    confine.hide()
    confine.no_new_privileges()
    if config["scoped"]:
        confine.scope_out()
    confine.limit_resources({"core": config["core"]})  # which the filter lets nobody change any more
    confine.filter_system_calls(base64.b64decode(config["filter"]))
    return listener


def be_enclosed(config: dict[str, Any], confine: Any) -> None:
    """Where bubblewrap has made the place: it leaves to this what needs privileges, and to give them up."""
    for path, (size, inodes) in config["sizes"].items():
        confine.bound_files(path, size, inodes)
    confine.bound_terminals("/dev/pts", TERMINALS)
    if config["in_namespace"]:
        confine.bound_user(OF_A_USER)
        confine.make_read_only("/proc/sys")
        confine.map_user(config["uid"], config["uid"])
        confine.drop_privileges(-1, -1)
    else:
        confine.make_read_only("/proc/sys")
        for path in config["owned"]:
            give(path, config["uid"])
        confine.drop_privileges(config["uid"], config["uid"])


def be_contained(config: dict[str, Any], confine: Any) -> None:
    """Where an engine has made it: look whether it has done what it was asked to."""
    for path, (size, inodes) in config["sizes"].items():
        confine.check_files(path, size, inodes)
    for path in config["folders"]:
        os.makedirs(path, exist_ok=True)
    if not config["is_root"]:
        confine.no_new_privileges()  # without which the bounding set cannot be given up
        confine.drop_privileges(-1, -1)


def control_of(argument: str) -> socket.socket:
    """The socket to the host."""
    if not argument.startswith("/"):
        control = socket.socket(fileno=int(argument))
        control.set_inheritable(False)
        return control
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.connect(argument)
    return control


def main(argument: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that it does nothing to the first process
    control = control_of(argument)
    confine = load_sibling("confine")
    message, _ = receive(control)
    if message is None:
        return
    init = Init(control, confine)
    try:
        config = message["configure"]
        init.limits = config["limits"]
        listener = configure(config, confine)
    except OSError as error:
        send(control, {"unfit": str(error) if error.filename else error.strerror})
        return
    if listener is None:
        send(control, {"ready": True})
    else:
        with listener:
            send(control, {"ready": True}, [listener.fileno()])
    init.serve()


if __name__ == "__main__":
    main(sys.argv[1])
