"""Owns TLS for NBD: certificates or pre-shared keys into an ssl context, and the way of TLS traffic to the reactor.

Spec: NBD ``doc/proto.md``, "TLS support"; TLS 1.2 is the oldest version that is spoken. Pre-shared keys need an ssl
module that has them (Python 3.13). Knows nothing of options and requests.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

import trio

PUMP_BYTES = 256 * 1024  # one receive buffer of the native side
LINGER_S = 1.0  # how long a peer may take to read its last replies
HAS_PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")


class TlsError(Exception):
    """TLS as it is set up cannot work. *key* names the setting, the text is one line that says why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"nbd.tls.{key}: {why}")
        self.key = key
        self.why = why


class TlsSettings(Protocol):
    """What this file needs of ``settings.nbd.tls``."""

    @property
    def certificate(self) -> str | None: ...
    @property
    def key(self) -> str | None: ...
    @property
    def client_ca(self) -> str | None: ...
    @property
    def psk_file(self) -> str | None: ...


def make_context(settings: TlsSettings) -> ssl.SSLContext:
    """The server's context. Raises TlsError when something is missing or does not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.psk_file is not None:
        _use_keys(context, settings.psk_file)
    elif settings.certificate is None:
        raise TlsError("certificate", "TLS needs a certificate, or nbd.tls.psk_file")
    if settings.certificate is not None:
        _use_certificate(context, settings.certificate, settings.key)
    if settings.client_ca is not None:
        _verify_clients(context, settings.client_ca)
    return context


def _use_certificate(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise TlsError("certificate", f"{certificate}: {_reason(error)}") from None


def _verify_clients(context: ssl.SSLContext, authority: str) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise TlsError("client_ca", f"{authority}: {_reason(error)}") from None


def _use_keys(context: ssl.SSLContext, path: str) -> None:
    if not HAS_PSK:
        raise TlsError("psk_file", "pre-shared keys need Python 3.13 or newer")
    keys = read_keys(path)
    # OpenSSL's callback for TLS 1.2 and the one for 1.3 differ, and Python has the former only.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("kECDHEPSK")  # forward secret; every TLS library with pre-shared keys has it
    context.set_psk_server_callback(key_lookup(keys), "nbd")  # type: ignore[attr-defined, unused-ignore]


def key_lookup(keys: dict[str, bytes]) -> Callable[[str | None], bytes]:
    """The callback that finds the key of an identity; no key, no handshake."""

    def lookup(identity: str | None) -> bytes:
        found = b""
        for name, key in keys.items():
            # All are compared, so that the time says nothing about which identities exist.
            if hmac.compare_digest(name.encode(), (identity or "").encode()):
                found = key
        return found

    return lookup


def read_keys(path: str) -> dict[str, bytes]:
    """Keys by identity from a file of ``identity:hex`` lines, as psktool writes them. Raises TlsError."""
    try:
        with open(path, encoding="utf-8") as file:
            pairs = [line.strip().rpartition(":") for line in file if line.strip() and line[0] != "#"]
        keys = {identity: bytes.fromhex(digits) for identity, _, digits in pairs}
    except (OSError, ValueError) as error:
        raise TlsError("psk_file", f"{path}: {_reason(error)}") from None
    if not keys or "" in keys or b"" in keys.values():
        raise TlsError("psk_file", f"{path}: must have lines of the form identity:hexadecimal-key")
    return keys


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


async def start_tls(stream: trio.SocketStream, context: ssl.SSLContext) -> trio.SSLStream[trio.SocketStream]:
    """Encrypt *stream*. Raises trio.BrokenResourceError when the peer cannot be agreed with."""
    encrypted = trio.SSLStream(stream, context, server_side=True)
    await encrypted.do_handshake()
    return encrypted


class Pump:
    """Carries TLS traffic between *stream* and a socket pair whose other end, ``fd``, goes to the reactor.

    The reactor knows no TLS: OpenSSL would block its loop for a record at a time, for all connections. So trio encrypts
    and decrypts here, in large pieces, since each piece costs trio some 80 µs; that bounds the rate, and only TLS
    connections pay for it.
    """

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream
        ours, self._theirs = socket.socketpair()
        self._ours = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    @property
    def fd(self) -> int:
        return self._theirs.fileno()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry until nothing more can go out; the reactor then sees a hang-up, if it was not the one to close."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._inward)
                nursery.start_soon(self._outward, nursery.cancel_scope)
                task_status.started()
        finally:
            self._ours.socket.close()

    def close_inner(self) -> None:
        """The reactor is done with its end: send what is left in the pipe, then end."""
        self._theirs.close()

    def close(self) -> None:
        self._theirs.close()
        self._ours.socket.close()

    async def _inward(self) -> None:
        # Whichever end goes away, the reactor sees the end of the stream.
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await self._stream.receive_some(PUMP_BYTES):
                await self._ours.send_all(data)
        with contextlib.suppress(trio.BrokenResourceError):
            await self._ours.send_eof()

    async def _outward(self, both: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await self._ours.receive_some(PUMP_BYTES):
                await self._stream.send_all(data)
        both.cancel()
