"""Owns one question about an I/O command: which guest memory will it read, and which will it write?

Asked only where guest memory is reached by messages, so that the bytes can be fetched before the command
runs and sent after it. An answer that is too large costs time, never correctness: the command itself is
checked by the queues.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol.nvme.commands import DatasetManagement, IoOpcode, ReadWrite, Record, Vector
from ..protocol.nvme.ocssd20 import CHUNK_DESCRIPTOR_BYTES, MAX_VECTOR_LBAS
from .namespaces import Namespace

ADDRESS_BYTES = 8
DSM_RANGE_BYTES = 16

FROM_HOST = frozenset({IoOpcode.WRITE, IoOpcode.COMPARE, IoOpcode.DSM, IoOpcode.VECTOR_WRITE})
TO_HOST = frozenset({IoOpcode.READ, IoOpcode.VECTOR_READ, IoOpcode.VECTOR_RESET})
_SCALAR = frozenset({IoOpcode.READ, IoOpcode.WRITE, IoOpcode.COMPARE})
_VECTOR_DATA = frozenset({IoOpcode.VECTOR_READ, IoOpcode.VECTOR_WRITE})
_VECTOR = _VECTOR_DATA | {IoOpcode.VECTOR_RESET, IoOpcode.VECTOR_COPY}


@dataclass
class Transfer:
    """Lengths in bytes; ``lists`` are ``(address, length)`` of LBA lists."""

    data_bytes: int = 0
    metadata_bytes: int = 0
    lists: list[tuple[int, int]] = field(default_factory=list)
    from_host: bool = False


def transfer_of(command: Record, namespace: Namespace | None) -> Transfer:
    if namespace is None:
        return Transfer()
    found = Transfer(from_host=command.opcode in FROM_HOST)
    if command.opcode == IoOpcode.DSM:
        found.data_bytes = (DatasetManagement.parse(command.dwords).nr_0 + 1) * DSM_RANGE_BYTES
    elif command.opcode in _SCALAR:
        _blocks(found, namespace, command, ReadWrite.parse(command.dwords).nlb_0 + 1)
    elif command.opcode in _VECTOR:
        _vector(found, namespace, command)
    return found


def _blocks(found: Transfer, namespace: Namespace, command: Record, count: int) -> None:
    found.data_bytes = count * namespace.lba_bytes
    found.metadata_bytes = count * namespace.metadata_bytes if command.mptr else 0


def _vector(found: Transfer, namespace: Namespace, command: Record) -> None:
    body = Vector.parse(command.dwords)
    count = body.nlb_0 + 1
    if count > MAX_VECTOR_LBAS:
        return
    if count > 1:
        found.lists.append((body.lbal, count * ADDRESS_BYTES))
        if command.opcode == IoOpcode.VECTOR_COPY:
            found.lists.append((body.destination, count * ADDRESS_BYTES))
    if command.opcode in _VECTOR_DATA:
        _blocks(found, namespace, command, count)
    elif command.opcode == IoOpcode.VECTOR_RESET and command.mptr:
        found.metadata_bytes = count * CHUNK_DESCRIPTOR_BYTES
