"""Owns the daemon's life: which things are started in which order, what ends it, and the mirror of the start.

The order is the table STEPS at the end. A stop tells the service manager, closes the doors (each transport
drains what it has), stops the loop, then flushes, checkpoints and closes the image; a second signal is a
power cut.

trio has the main thread, the reactor one of its own. What keeps the daemon from starting is a SettingsError
(usage), a StartError or a ListenError (run time): each one line for people.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import trio

from ocssd_daemon._fast import give_back_memory
from ocssd_daemon.control.methods import handlers
from ocssd_daemon.control.server import serve_control
from ocssd_daemon.device import INTERRUPT, Device
from ocssd_daemon.doors import DOORS, Door
from ocssd_daemon.lifecycle import Step, Tasks, live
from ocssd_daemon.log import kv
from ocssd_daemon.pidfile import Pidfile
from ocssd_daemon.settings import Settings
from ocssd_daemon.transport.listen import Address, Listener, UnixAddress, from_fd, open_listener, unix_address
from ocssd_daemon.transport.notify import Notifier

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXTEND_S = 5.0  # how often a slow stop asks the service manager for more time


@dataclass(frozen=True)
class Options:
    """What belongs to one run, not to the device."""

    fd: int | None = None
    pidfile: str | None = None
    run: str | None = None
    exit_with_parent: bool = False
    named: frozenset[str] = frozenset()  # the settings that somebody gave
    on_ready: Callable[[Daemon], None] | None = None


class Daemon:
    """One run of the daemon. *passed* are the sockets of socket activation, by name."""

    def __init__(self, settings: Settings, options: Options, passed: dict[str, list[Listener]]) -> None:
        self.settings = settings
        self.options = options
        self.doors: list[tuple[Door, Listener]] = []
        self.control: Listener | None = None
        self.device: Device | None = None
        self.exit_code = 0
        self._passed = passed
        self._notifier = Notifier()
        self._cleanup = contextlib.ExitStack()  # files that must not outlive the daemon
        self._pidfile: Pidfile | None = None
        self._stopping = trio.Event()
        self._was_ready = False
        self._tasks: Tasks

    async def main(self) -> int:
        """Live from start to end; the exit code. Raises what kept it from starting."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            self._tasks = Tasks(nursery)
            nursery.start_soon(self._obey_signals)
            try:
                await live(self, STEPS, self._stopping)
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return self.exit_code

    def stop(self, reason: str, exit_code: int = 0) -> None:
        """Ask for a clean end; the first to ask decides the exit code."""
        if not self._stopping.is_set():
            log.info(kv("stop", reason=reason))
            self.exit_code = exit_code
            self._stopping.set()

    async def _obey_signals(self) -> None:
        signal.signal(INTERRUPT, lambda *_: None)
        with trio.open_signal_receiver(*STOP_SIGNALS) as arrived:
            asked = False  # by a signal: one that meets a daemon which ends of its own accord changes nothing
            async for number in arrived:
                if asked:
                    self._power_cut(number)
                asked = True
                self.stop(signal.Signals(number).name)

    def _power_cut(self, number: int) -> None:
        """End at once: nothing is flushed, as when the mains fail, but no file of ours stays."""
        for listener in self._listeners():
            listener.close()
        self._cleanup.close()
        os._exit(128 + number)

    # What others ask.

    def _listeners(self) -> list[Listener]:
        return [listener for _, listener in self.doors] + ([self.control] if self.control else [])

    def addresses(self) -> list[str]:
        """Where to attach."""
        return [door.uri(listener.address, self.settings) for door, listener in self.doors]

    def environment(self) -> dict[str, str]:
        """Variables for a command that wants to attach: $uri, $socket, $ctl, as far as they exist."""
        found = {door.variable: door.uri(listener.address, self.settings) for door, listener in reversed(self.doors)}
        if self.control is not None and self.control.path:
            found["ctl"] = self.control.path
        return found

    # Step files: what must not outlive the daemon. The pid file is locked now and written when ready.

    async def open_files(self) -> None:
        if self.options.pidfile is not None:
            self._pidfile = Pidfile(self.options.pidfile)
            self._cleanup.callback(self._pidfile.close)

    async def remove_files(self) -> None:
        self._cleanup.close()

    # Step device: the image. In a thread, so that signals are obeyed while a large one is recovered.

    async def open_device(self) -> None:
        self.device = await trio.to_thread.run_sync(Device, self.settings, self.options.named)

    async def close_device(self) -> None:
        if self.device is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_for_time)
            await trio.to_thread.run_sync(self.device.close if self._was_ready else self.device.abandon)
            nursery.cancel_scope.cancel()

    async def _ask_for_time(self) -> None:
        while True:
            self._notifier.send(EXTEND_TIMEOUT_USEC=int(2e6 * EXTEND_S), STATUS="closing the image")
            await trio.sleep(EXTEND_S)

    # Step reactor: the loop, and the task that hands on its reports.

    async def start_reactor(self) -> None:
        assert self.device is not None
        trio_token = trio.lowlevel.current_trio_token()

        def ended() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(self.stop, "the reactor ended", 1, trio_token=trio_token)

        self.device.start(ended)
        await self._tasks.start("reactor", self._dispatch_reports, self.device)
        if self._notifier.watchdog_interval_s:
            await self._tasks.start("reactor", self._feed_watchdog, self.device, self._notifier.watchdog_interval_s)

    async def stop_reactor(self) -> None:
        await self._tasks.end("reactor")
        if self.device is not None:
            await trio.to_thread.run_sync(self.device.stop)

    async def _dispatch_reports(self, device: Device, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(device.reactor.event_fd)
            device.dispatch()

    async def _feed_watchdog(self, device: Device, every_s: float, *, task_status: trio.TaskStatus[None]) -> None:
        """Tell the manager that we live, each time after the loop has proved it: it gave its lock away."""
        task_status.started()
        while True:
            await trio.to_thread.run_sync(device.touch, abandon_on_cancel=True)
            self._notifier.send(WATCHDOG=1)
            await trio.sleep(every_s)

    # Step doors: listen on everything first, then serve, so that a bad address leaves no half-open daemon.

    async def open_doors(self) -> None:
        for door in DOORS.values():
            for listener in self._passed.pop(door.name, []):
                self.doors.append((door, listener))
            for address in door.addresses(self.settings):
                self.doors.append((door, open_listener(self._place(address, door.name))))
        if self.options.fd is not None:
            self.doors.append((DOORS["vhost-user"], from_fd(self.options.fd)))
        open_doors = len(self.doors)

        async def serve(door: Door, listener: Listener, *, task_status: trio.TaskStatus[None]) -> None:
            nonlocal open_doors
            await door.serve()(listener, self.device, task_status=task_status)
            open_doors -= 1
            if not open_doors:
                self.stop("the only connection has ended")

        for door, listener in self.doors:
            await self._tasks.start("doors", serve, door, listener)

    async def close_doors(self) -> None:
        await self._tasks.end("doors")
        for _, listener in self.doors:
            listener.close()

    def _place(self, address: Address, name: str) -> Address:
        """The address to listen on; a path of ``-`` asks for a private directory."""
        if not isinstance(address, UnixAddress) or address.path != "-":
            return address
        directory = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ocssd-"))
        return unix_address(f"{directory}/{name}.sock")

    # Step control.

    async def open_control(self) -> None:
        assert self.device is not None
        passed = self._passed.pop("control", [])
        path = self.settings.control.socket or self._default_control()
        if not passed and path is None:
            return
        self.control = passed[0] if passed else open_listener(unix_address(path or ""))
        await self._tasks.start("control", serve_control, self.control.sockets, handlers(self.device, self.addresses))

    def _default_control(self) -> str | None:
        paths = [listener.path for _, listener in self.doors if listener.path and not listener.inherited]
        return f"{paths[0]}.ctl" if paths else None

    async def close_control(self) -> None:
        await self._tasks.end("control")
        if self.control is not None:
            self.control.close()

    # Step ready: say so, and watch whom we depend on.

    async def say_ready(self) -> None:
        give_back_memory()
        if self.options.exit_with_parent:
            await self._tasks.start("companions", self._watch_parent)
        if self._pidfile is not None:
            self._pidfile.write()
        self._was_ready = True
        log.info(
            kv(
                "ready",
                control=self.control.path if self.control else "none",
                serving=",".join(self.addresses()),
            )
        )
        if self.options.on_ready is not None:
            self.options.on_ready(self)
        self._notifier.send(READY=1, STATUS=f"serving {' '.join(self.addresses())}")
        if self.options.run is not None:
            await self._tasks.start("companions", self._run_command, self.options.run)

    async def say_stopping(self) -> None:
        self._notifier.send(STOPPING=1)
        await self._tasks.end("companions")

    async def _run_command(self, command: str, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        done = await trio.run_process(
            ["/bin/sh", "-c", command], env=os.environ | self.environment(), stdin=None, check=False
        )
        code = done.returncode
        self.stop("the command ended", code if code >= 0 else 128 - code)

    async def _watch_parent(self, *, task_status: trio.TaskStatus[None]) -> None:
        parent = os.pidfd_open(os.getppid())
        try:
            task_status.started()
            await trio.lowlevel.wait_readable(parent)
            self.stop("the parent ended")
        finally:
            os.close(parent)


STEPS = (
    Step("files", Daemon.open_files, Daemon.remove_files),
    Step("device", Daemon.open_device, Daemon.close_device),
    Step("reactor", Daemon.start_reactor, Daemon.stop_reactor),
    Step("doors", Daemon.open_doors, Daemon.close_doors),
    Step("control", Daemon.open_control, Daemon.close_control),
    Step("ready", Daemon.say_ready, Daemon.say_stopping),
)
