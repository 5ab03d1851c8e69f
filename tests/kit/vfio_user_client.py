"""A vfio-user client in plain sockets: what QEMU sends, one call per message, and its guest memory.

``memory`` is shared RAM (a memfd) mapped at address 0; with ``shared=False`` no descriptor is sent and the client
serves the server's DMA messages while it waits for replies.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import select
import socket
import struct
from typing import Any

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20
VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS = 1, 2, 3, 4, 5, 7, 8
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET, WRITE_MULTI = 9, 10, 11, 12, 13, 15
BAR0, BAR4, CONFIG = 0, 4, 7
INTX, MSIX = 0, 2
CAPABILITIES = {"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096}}


class VfioError(Exception):
    def __init__(self, command: int, errno: int) -> None:
        super().__init__(f"command {command}: {os.strerror(errno)}")
        self.errno = errno


class VfioUserClient:
    def __init__(self, path: str, memory_bytes: int = 64 << 20, *, shared: bool = True,
                 timeout_s: float = 10.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        self.sock.connect(path)
        self.memory_fd = os.memfd_create("guest")
        os.ftruncate(self.memory_fd, memory_bytes)
        self.memory = mmap.mmap(self.memory_fd, memory_bytes)
        self.shared = shared
        self.dma_messages = self.largest_dma_bytes = 0
        self._next_id = 0

    def close(self) -> None:
        self.sock.close()
        self.memory.close()
        os.close(self.memory_fd)

    def __enter__(self) -> VfioUserClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- messages -----------------------------------------------------------------------------------------

    def send(self, command: int, payload: bytes = b"", *, fds: tuple[int, ...] = (), flags: int = 0) -> int:
        self._next_id = (self._next_id + 1) & 0xFFFF
        raw = HEADER.pack(self._next_id, command, 16 + len(payload), flags, 0) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([raw], ancillary)
        self.sock.sendall(raw[sent:])
        return self._next_id

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece, ancillary, _, _ = self.sock.recvmsg(count - len(data), socket.CMSG_SPACE(64))
            if not piece:
                raise ConnectionResetError("the server closed the connection")
            for _, _, raw in ancillary:
                self.received_fds = list(array.array("i", raw[:len(raw) // 4 * 4]))
            data += piece
        return data

    def receive(self) -> tuple[int, int, int, int, bytes]:
        """``(id, command, flags, errno, payload)`` of the next message."""
        number, command, size, flags, errno = HEADER.unpack(self._receive(16))
        return number, command, flags, errno, self._receive(size - 16)

    def wait_reply(self, wanted: int) -> bytes:
        while True:
            number, command, flags, errno, payload = self.receive()
            if flags & 0xF == 0:
                self._serve_dma(number, command, payload)
            elif number == wanted:
                if flags & ERROR:
                    raise VfioError(command, errno)
                return payload

    def call(self, command: int, payload: bytes = b"", *, fds: tuple[int, ...] = ()) -> bytes:
        return self.wait_reply(self.send(command, payload, fds=fds))

    def serve(self, timeout_s: float) -> bool:
        """Answer one DMA message if one comes within the time."""
        if not select.select([self.sock], [], [], timeout_s)[0]:
            return False
        number, command, _, _, payload = self.receive()
        self._serve_dma(number, command, payload)
        return True

    def _serve_dma(self, number: int, command: int, payload: bytes) -> None:
        address, count = struct.unpack_from("<QQ", payload)
        self.dma_messages += 1
        if address + count > len(self.memory):
            self.sock.sendall(HEADER.pack(number, command, 16, REPLY | ERROR, 19))
            return
        data = b""
        if command == DMA_READ:
            data = self.memory[address:address + count]
        else:
            self.memory[address:address + count] = payload[16:]
        reply = struct.pack("<QQ", address, count) + data
        # Once and without blocking, as QEMU 11.1 does: of a reply that the socket takes in part, the rest is lost.
        self.sock.send(HEADER.pack(number, command, 16 + len(reply), REPLY, 0) + reply, socket.MSG_DONTWAIT)
        self.largest_dma_bytes = max(self.largest_dma_bytes, count)

    # ---- what QEMU does, in its order ---------------------------------------------------------------------

    def negotiate(self) -> Any:
        payload = self.call(VERSION, struct.pack("<HH", 0, 0) + json.dumps(CAPABILITIES).encode() + b"\0")
        return json.loads(payload[4:-1])

    def map_memory(self, address: int = 0, size: int | None = None, offset: int = 0, flags: int = 3) -> None:
        fds = (self.memory_fd,) if self.shared else ()
        size = len(self.memory) if size is None else size
        self.call(DMA_MAP, struct.pack("<IIQQQ", 32, flags, offset, address, size), fds=fds)

    def unmap_memory(self, address: int = 0, size: int | None = None) -> None:
        size = len(self.memory) if size is None else size
        self.call(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, address, size))

    def region_info(self, index: int, argsz: int = 32) -> tuple[int, ...]:
        """``(argsz, flags, index, cap_offset, size, offset)``"""
        return struct.unpack_from("<IIIIQQ", self.call(GET_REGION_INFO, struct.pack("<IIIIQQ", argsz, 0, index, 0, 0,
                                                                                    0)))

    def irq_info(self, index: int) -> tuple[int, ...]:
        """``(argsz, flags, index, count)``"""
        return struct.unpack("<IIII", self.call(GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0)))

    def set_irqs(self, flags: int, index: int, start: int, count: int, *, fds: tuple[int, ...] = (),
                 data: bytes = b"") -> None:
        self.call(SET_IRQS, struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data, fds=fds)

    def read(self, region: int, offset: int, count: int) -> bytes:
        return self.call(REGION_READ, struct.pack("<QII", offset, region, count))[16:]

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.call(REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data)

    def post(self, region: int, offset: int, data: bytes) -> None:
        """A write that wants no reply, as QEMU sends registers."""
        self.send(REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data, flags=NO_REPLY)

    def reset(self) -> None:
        self.call(RESET)
