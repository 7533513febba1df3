"""Tasks in separate processes: one that crashes, hangs or is killed loses only its own result."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

USES = 24  # tasks per process: compiled code is never freed


class Died(Exception):
    """A task gave no result; the message says how it ended."""


def _serve(connection: Connection) -> None:
    while True:
        task, argument = connection.recv()
        connection.send(task(argument))


class Worker:
    """A process that runs one task after the other, and is replaced when it dies, hangs or is old."""

    def __init__(self, limit_s: float, uses: int = USES) -> None:
        self.limit_s, self.uses, self.used = limit_s, uses, 0
        self.process: Any = None

    def do(self, task: Callable[[Any], Any], argument: Any) -> Any:
        """The result of ``task`` (a function of a module) for ``argument``.

        Raises:
            Died: it took too long, or its process ended.
        """
        if self.process is None or self.used == self.uses:
            self._start()
        self.used += 1
        try:
            return self._ask(task, argument)
        except Died:
            self.stop()
            raise

    def _ask(self, task: Callable[[Any], Any], argument: Any) -> Any:
        try:
            self.connection.send((task, argument))
            if self.connection.poll(self.limit_s):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise Died(f"its process ended with status {self.process.exitcode}") from None
        raise Died(f"no result after {self.limit_s:.0f} s")

    def _start(self) -> None:
        self.stop()
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process, self.used = context.Process(target=_serve, args=(theirs,), daemon=True), 0
        self.process.start()
        theirs.close()  # otherwise the end of the process would not be noticed here

    def stop(self) -> None:
        """End the process, even while it runs a task."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
