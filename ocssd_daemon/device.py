"""Owns the assembly of one device: settings → flash, FTL, disk and the reactor that runs them.

Transports and the control socket get a ``Device`` and nothing else. They ask it for the disk and the
reactor, tell it their counters, and take a token from it under which the reactor reports to them. Reports
wait in the reactor behind an eventfd; ``dispatch`` hands them to whoever holds the token.

Knows no socket and no event loop.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from ocssd_daemon import physics
from ocssd_daemon._fast import Disk, Ftl, Media, Reactor
from ocssd_daemon._physics import age_of
from ocssd_daemon.ftl.ownership import owned_pus
from ocssd_daemon.ftl.target import Target, open_target
from ocssd_daemon.log import kv
from ocssd_daemon.nand.aging import CHUNK_OFFLINE
from ocssd_daemon.nand.store import Store, boot_id, open_file, open_ram
from ocssd_daemon.settings import Settings, SettingsError, names_geometry

log = logging.getLogger(__name__)

Counters = Mapping[str, int | float]
Clock = Literal["real", "virtual"]
GUARD_S = 1.0
INTERRUPT = signal.SIGURG  # ignored unless the daemon wants it: it ends a system call that blocks, and nothing else
NO_DISK = "ftl.pus: the host FTL owns no parallel unit, so there is no disk to serve"


class DeviceError(ValueError):
    """Settings that are sound one by one but make no device; one line."""


class Device:
    """One emulated Open-Channel SSD.

    ``media``, ``ftl``, ``disk`` and ``reactor`` are the compiled parts; ``geometry`` is the flash's shape. Without PUs
    of its own (setting ``ftl.pus``) the host FTL does not exist: ``ftl`` is None, and ``disk`` raises DeviceError.
    *named* are the settings that somebody gave: they are kept or refused, defaults may be bent to fit.
    *clock* ``virtual``: time is what ``media.now_ns`` is set to before each command, and no data is kept.
    *wall_ns* tells the time of day: an image remembers when it was how old.
    Acquires the image and its lock until ``close``. Raises DeviceError and StoreError.
    """

    def __init__(
        self,
        settings: Settings,
        named: frozenset[str] = frozenset(),
        clock: Clock = "real",
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.settings = settings
        self._wall_ns = wall_ns
        self.store = _open_store(settings, named, keep_data=clock == "real")
        self.geometry = self.store.geometry
        try:
            owned = _owned_pus(settings, self.geometry.total_pus)
            fresh = self.store.is_fresh
            _before_use(settings, self.store)
            self.target = _open_target(settings, named, self.store, owned) if owned else None
            self.media = self.target.media if self.target else _open_media(settings, self.store)
            self.ftl = self.target.ftl if self.target else None
            self.physics = _physics(settings, self.store, self.media, self.ftl, fresh, clock == "virtual", wall_ns())
            self._save_age()
        except BaseException:
            self.store.abandon()
            raise
        self.ftl_owns = np.zeros(self.geometry.total_pus, np.uint8)
        self.ftl_owns[owned] = 1
        self.reactor = Reactor(settings.reactor.poll_us)
        self.reactor.follow(self.media)
        self._transports: dict[str, Callable[[], Counters]] = {}
        self._reports: dict[int, Callable[[int], None]] = {}
        self._last_token = 0
        self._said_read_only = False
        if self.ftl is not None:
            self.ftl.notify(self.reactor.event_fd)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._ended = threading.Event()

    def close(self) -> None:
        """Clean stop of a device whose reactor stands still: program the buffers, leave a checkpoint."""
        self._save_age()
        if self.target is not None:
            self.target.close()
        self.store.close()

    def _save_age(self) -> None:
        """The latest time of day that was seen: a clock that goes back, and is put right later, ages nothing twice."""
        wall_ns = max(self.store.superblock.wall_ns, self._wall_ns())
        self.store.save_superblock(age_ns=age_of(self.media), wall_ns=wall_ns)

    def abandon(self) -> None:
        """Close after a start that failed: a file that it formatted is again what it was, if nobody wrote."""
        written = self.media.stats()["sectors_written"]
        if self.ftl is not None:
            written += self.ftl.stats()["user_sectors_written"]
        if self.store.was_formatted and not written:
            self.store.abandon()
        else:
            self.close()

    @property
    def disk(self) -> Disk:
        """The block view. Raises DeviceError when the host FTL owns nothing."""
        if self.target is None:
            raise DeviceError(NO_DISK)
        return self.target.disk

    # The reactor: one named thread, which runs without the GIL.

    def start(self, on_end: Callable[[], None] = lambda: None) -> None:
        """Start the loop that serves requests; *on_end* is called in its thread if it ends unasked."""
        self._say_read_only()

        def run() -> None:
            self.reactor.run()
            if not self._stopped:
                on_end()

        self._thread = threading.Thread(target=run, name="reactor", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, args=(self._thread,), name="guard", daemon=True).start()

    def _guard(self, reactor: threading.Thread) -> None:
        """Free the loop from a descriptor that its peer made block: a turn takes a millisecond, not seconds.

        A peer shares the flags of the eventfds that it gave us, and may clear O_NONBLOCK at any time. Asking before
        each signal would cost every honest one a system call, and still leave a race.
        """
        before = None
        while not self._ended.wait(GUARD_S):
            now = self.reactor.turn
            if now is not None and now == before and reactor.ident is not None and reactor.is_alive():
                signal.pthread_kill(reactor.ident, INTERRUPT)
            before = now

    def stop(self) -> None:
        """Stop the loop and wait for it; what it had deferred is completed first."""
        self._stopped = True
        self.reactor.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._ended.set()

    def touch(self) -> None:
        """Returns once the loop has given its lock away, which it does within a millisecond while it lives."""
        with self.reactor.paused():
            pass

    # What transports register.

    def add_transport(self, name: str, stats: Callable[[], Counters]) -> None:
        """Show a transport's counters under *name*."""
        self._transports[name] = stats

    def remove_transport(self, name: str) -> None:
        self._transports.pop(name, None)

    def new_token(self, handler: Callable[[int], None]) -> int:
        """A token for ``source_t.token``. *handler* gets the code of each report and must not block."""
        self._last_token += 1
        self._reports[self._last_token] = handler
        return self._last_token

    def forget(self, token: int) -> None:
        """Drop what is still reported under *token*."""
        self._reports.pop(token, None)

    def dispatch(self) -> None:
        """Hand all waiting reports to their owners. A report whose owner has gone is dropped."""
        self._say_read_only()
        for token, code in self.reactor.events():
            handler = self._reports.get(token)
            if handler is None:
                log.debug(kv("reactor.report_dropped", token=token, code=code))
            else:
                handler(code)

    def _say_read_only(self) -> None:
        """Once: the FTL signals the reactor's eventfd when its spare space ends."""
        if self.ftl is not None and self.ftl.read_only and not self._said_read_only:
            self._said_read_only = True
            offline = int((self.media.chunks["state"] == CHUNK_OFFLINE).sum())
            log.warning(kv("ftl.read_only", reason="no spare space is left: writes fail, reads go on", offline=offline))

    # What operators see.

    def disk_info(self) -> dict[str, Any]:
        """The block view's facts."""
        disk = self.target.disk if self.target else None
        return {
            "size_bytes": disk.size_bytes if disk else 0,
            "block_bytes": disk.block_bytes if disk else 0,
            "read_only": disk.read_only if disk else self.settings.read_only,
            "store": self.settings.store or "RAM",
            "started": self.target.how_started if self.target else "raw",
        }

    def stats(self) -> dict[str, Any]:
        """Every counter, by part; names are the same everywhere."""
        with self.reactor.paused():
            parts = {part: getattr(self, part).stats() for part in ("ftl", "media", "reactor") if getattr(self, part)}
            parts["physics"] = self.physics.stats()
        # Outside: transports take the reactor's lock for their own counters, and it is not recursive.
        transports = {name: dict(stats()) for name, stats in self._transports.items()}
        return {"ftl": {}, **parts, "transports": transports}


def _open_store(settings: Settings, named: frozenset[str], keep_data: bool) -> Store:
    if settings.store is None or not keep_data:
        return open_ram(settings.geometry, keep_data)
    return open_file(settings.store, settings.geometry, names_geometry(named))


def _owned_pus(settings: Settings, total: int) -> list[int]:
    """The PUs of the host FTL; with ``auto`` all of them, unless a raw namespace is all that is served."""
    block_namespace = settings.nvme.socket is not None and "block" in settings.nvme.namespaces
    raw_only = settings.nvme.socket is not None and not block_namespace
    block_doors = settings.vhost.socket is not None or bool(settings.nbd.listen)
    try:
        owned = owned_pus(settings.ftl.pus, total, disk_is_served=block_doors or not raw_only)
    except ValueError as error:
        raise DeviceError(str(error)) from None
    if not owned and (block_doors or block_namespace):
        raise DeviceError(NO_DISK)
    return owned


def _open_media(settings: Settings, store: Store) -> Media:
    store.save_superblock(clean=False, boot_id=boot_id(), durability=settings.durability)
    return Media(store, early_reset=settings.nvme.early_reset, multi_reset=settings.nvme.multi_reset)


def _open_target(settings: Settings, named: frozenset[str], store: Store, owned: list[int]) -> Target:
    ftl = settings.ftl
    try:
        return open_target(
            store,
            op=ftl.op,
            op_is_exact="ftl.op" in named,
            block_bytes=ftl.block_bytes,
            durability=settings.durability,
            read_only=settings.read_only,
            victim=ftl.victim,
            frontiers=ftl.frontiers,
            reserve_lines=ftl.reserve_lines,
            d_choices=ftl.d_choices,
            wear_spread=ftl.wear_spread,
            settle=ftl.settle,
            retire=ftl.retire,
            seed=settings.seed,
            early_reset=settings.nvme.early_reset,
            multi_reset=settings.nvme.multi_reset,
            pus=owned,
        )
    except ValueError as error:
        raise DeviceError(str(error)) from None


def _before_use(settings: Settings, store: Store) -> None:
    try:
        physics.before_use(settings, store)
    except physics.PhysicsError as error:
        raise DeviceError(str(error)) from None


def _physics(
    settings: Settings, store: Store, media: Media, ftl: Ftl | None, fresh: bool, virtual: bool, wall_ns: int
) -> physics.Physics:
    try:
        return physics.attach(settings, store, media, ftl, fresh, virtual, wall_ns)
    except (physics.PhysicsError, SettingsError) as error:
        raise DeviceError(str(error)) from None
