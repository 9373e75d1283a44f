"""The zygote: a clean process that has imported what a worker needs, and forks workers.

fd 3: line to the supervisor; 4: compiled configuration; 5, 6: its own and the workers' compiled
sandbox profiles; 7: the control log. It holds no secret and never sees a client. Everything is
imported before the first fork (late imports die under seccomp) and frozen out of the garbage
collector's sight, so that a worker shares these pages as long as it lives.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys

from kbusd.rings import entries
from kbusd.rings.line import Line, LineError, pair
from kbusd.sandbox import apply
from kbusd.sandbox.compiled import decode as decode_compiled
from kbusd.workers import worker
from kbusd.workers.context import Context, read_all


class Zygote:
    """Forks a worker for each Fork, says what became of it."""

    def __init__(self, context: Context, line: Line) -> None:
        self.context = context
        self.line = line
        self.workers: dict[int, int] = {}

    def fork(self, number: int) -> None:
        ours, supervisors = pair()
        brokers, theirs = pair()
        locked_reader, locked_writer = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.close(locked_reader)
                self.line.sock.close()
                supervisors.close()
                theirs.close()
                status = worker.main(self.context, ours, brokers, locked_writer)
            except BaseException as error:  # the process ends here, whatever it was
                os.write(2, f"kbusd-worker: {type(error).__name__}: {error}\n".encode())
                if os.environ.get("KBUSD_TRACEBACK"):
                    sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        os.close(locked_writer)
        ours.close()
        brokers.close()
        with supervisors, theirs:
            # The worker says one byte when it is locked down; without it no client may get it.
            locked = os.read(locked_reader, 1)
            os.close(locked_reader)
            if not locked:
                os.waitpid(pid, 0)
                raise SystemExit("kbusd-zygote: a worker could not be confined; see above")
            self.workers[pid] = number
            pidfd = os.pidfd_open(pid)
            fds = [supervisors.fileno(), theirs.fileno(), pidfd]
            self.line.send(entries.Forked(number, pid), fds)
            os.close(pidfd)

    def reap(self) -> None:
        while self.workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number = self.workers.pop(pid, None)
            if number is not None:
                self.line.send(entries.Ended(number, status))

    def receive(self) -> None:
        while (received := self.line.receive()) is not None:
            message, fds = received
            match message:
                case entries.Fork():
                    self.fork(message.worker)
                case entries.Configured():
                    self.context = self.context.with_configuration(read_all(fds[0]))
                    os.close(fds[0])
                    gc.collect()
                    gc.freeze()

    def run(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            selector.register(self.line, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == reader:
                        with contextlib.suppress(BlockingIOError):
                            os.read(reader, 4096)
                        self.reap()
                    else:
                        self.receive()
                while not self.line.flush():
                    selectors.DefaultSelector().select(0.001)


def main() -> None:
    _, guid, supervisor = sys.argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is the supervisor's to handle
    own, workers = (decode_compiled(read_all(fd)) for fd in (5, 6))
    line = Line(socket.socket(fileno=3), entries.ToZygote)
    context = Context.make(guid, int(supervisor), read_all(4), workers, log_fd=7)
    for fd in (4, 5, 6):
        os.close(fd)
    zygote = Zygote(context, line)
    apply.confine(own, keep_fds=[0, 1, 2, 3, 7])
    gc.collect()
    gc.freeze()
    with contextlib.suppress(EOFError, LineError, ConnectionError):
        zygote.run()


if __name__ == "__main__":
    main()
