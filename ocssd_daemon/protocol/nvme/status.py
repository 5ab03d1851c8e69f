"""Owns the names, values, specification sections and texts of all completion statuses this project gives.

A status is ``SCT << 8 | SC`` (NVM Express Base 1.3, 4.6.1); the same number is used in the flash core, so
nothing is translated on the way out. Whether Do Not Retry goes with it is decided here too, by
:func:`status_field`.
"""

from __future__ import annotations

from enum import IntEnum

DO_NOT_RETRY = 0x4000


class Status(IntEnum):
    """``SCT << 8 | SC``; the member's ``section`` and ``text`` say where it is defined and what it means."""

    section: str
    text: str

    def __new__(cls, value: int, section: str, text: str) -> Status:
        member = int.__new__(cls, value)
        member._value_ = value
        member.section = section
        member.text = text
        return member

    SUCCESS = 0x000, "Base 4.6.1.2.1", "successful completion"
    INVALID_OPCODE = 0x001, "Base 4.6.1.2.1", "the opcode is not supported"
    INVALID_FIELD = 0x002, "Base 4.6.1.2.1", "a reserved or unsupported value in a defined field"
    COMMAND_ID_CONFLICT = 0x003, "Base 4.6.1.2.1", "the command identifier is already in use"
    DATA_TRANSFER_ERROR = 0x004, "Base 4.6.1.2.1", "data or metadata could not be transferred"
    INTERNAL_ERROR = 0x006, "Base 4.6.1.2.1", "the device itself failed"
    ABORT_REQUESTED = 0x007, "Base 4.6.1.2.1", "aborted by an Abort command"
    ABORTED_SQ_DELETION = 0x008, "Base 4.6.1.2.1", "the submission queue was deleted"
    FAILED_FUSED = 0x009, "Base 4.6.1.2.1", "the other command of the fused pair failed"
    MISSING_FUSED = 0x00A, "Base 4.6.1.2.1", "the other command of the fused pair is missing"
    INVALID_NAMESPACE = 0x00B, "Base 4.6.1.2.1", "the namespace or its format is invalid"
    COMMAND_SEQUENCE = 0x00C, "Base 4.6.1.2.1", "protocol violation in a sequence of commands"
    SGL_SEGMENT_INVALID = 0x00D, "Base 4.6.1.2.1", "an invalid SGL segment or last segment descriptor"
    SGL_COUNT_INVALID = 0x00E, "Base 4.6.1.2.1", "an invalid number of SGL descriptors"
    DATA_SGL_LENGTH = 0x00F, "Base 4.6.1.2.1", "the data SGL does not fit the transfer length"
    METADATA_SGL_LENGTH = 0x010, "Base 4.6.1.2.1", "the metadata SGL does not fit the transfer length"
    SGL_TYPE_INVALID = 0x011, "Base 4.6.1.2.1", "an unsupported SGL descriptor type"
    PRP_OFFSET_INVALID = 0x013, "Base 4.6.1.2.1", "the offset field of a PRP entry is invalid"
    WRITE_PROTECTED = 0x020, "Base 1.4 4.6.1.2.1", "the namespace is write protected"
    LBA_OUT_OF_RANGE = 0x080, "Base 4.6.1.2.2", "an LBA beyond the size of the namespace"
    CAPACITY_EXCEEDED = 0x081, "Base 4.6.1.2.2", "the namespace has no room left"
    NAMESPACE_NOT_READY = 0x082, "Base 4.6.1.2.2", "the namespace is not ready"
    WRITE_FAILED_12 = 0x0FF, "OCSSD 1.2 5.3", "program failed (completion bitmap names the addresses)"
    CQ_INVALID = 0x100, "Base 5.4", "the completion queue does not exist"
    QID_INVALID = 0x101, "Base 5.3", "the queue identifier is out of range or in use"
    QUEUE_SIZE_INVALID = 0x102, "Base 5.3", "the queue size is zero or too large"
    ABORT_LIMIT = 0x103, "Base 5.1", "too many concurrent Abort commands"
    AER_LIMIT = 0x105, "Base 5.2", "too many outstanding Asynchronous Event Requests"
    VECTOR_INVALID = 0x108, "Base 5.3", "the interrupt vector does not exist"
    LOG_PAGE_INVALID = 0x109, "Base 5.14", "the log page is not supported"
    FORMAT_INVALID = 0x10A, "Base 5.23", "the LBA format is not supported"
    QUEUE_DELETION_INVALID = 0x10C, "Base 5.5", "the completion queue still has submission queues"
    FEATURE_NOT_SAVEABLE = 0x10D, "Base 5.21", "the feature cannot be saved"
    FEATURE_NOT_CHANGEABLE = 0x10E, "Base 5.21", "the feature cannot be changed"
    FEATURE_NOT_NAMESPACE = 0x10F, "Base 5.21", "the feature is not namespace specific"
    INVALID_PROTECTION = 0x181, "NVM 6", "protection information settings do not fit the namespace"
    READ_ONLY_RANGE = 0x182, "NVM 6", "write to a read-only range"
    WRITE_FAULT = 0x280, "Base 4.6.1.2.3", "the data could not be written"
    UNRECOVERED_READ = 0x281, "Base 4.6.1.2.3", "the data could not be recovered"
    COMPARE_FAILURE = 0x285, "Base 4.6.1.2.3", "the data compared are not equal"
    ACCESS_DENIED = 0x286, "Base 4.6.1.2.3", "access denied"
    UNWRITTEN = 0x287, "Base 4.6.1.2.3", "a deallocated or unwritten logical block, with DULBE on"
    OFFLINE_CHUNK = 0x2C0, "OCSSD 2.0 3", "the chunk is offline"
    INVALID_RESET = 0x2C1, "OCSSD 2.0 3", "the chunk cannot be reset in its state"
    HIGH_ECC = 0x2D0, "OCSSD 2.0 3", "data are good, but took high ECC effort (a warning)"
    WRITE_FAILED_NEXT_UNIT = 0x2F0, "OCSSD 2.0 3", "write failed, go on with the next write unit"
    WRITE_FAILED_CLOSED = 0x2F1, "OCSSD 2.0 3", "write failed, the chunk was closed early"
    OUT_OF_ORDER = 0x2F2, "OCSSD 2.0 3", "not at the write pointer of the chunk"
    EMPTY_PAGE = 0x2FF, "OCSSD 1.2 5.3", "read of an erased page"
    HIGH_ECC_12 = 0x700, "OCSSD 1.2 5.3", "data are good, but took high ECC effort (a warning)"


# Retrying these may help: the cause is in the device or passing, not in the command.
_RETRY = frozenset({
    Status.SUCCESS, Status.INTERNAL_ERROR, Status.ABORT_REQUESTED, Status.ABORTED_SQ_DELETION,
    Status.FAILED_FUSED,
    Status.NAMESPACE_NOT_READY, Status.HIGH_ECC, Status.WRITE_FAILED_NEXT_UNIT, Status.WRITE_FAILED_CLOSED,
})


def status_field(status: int) -> int:
    """The 15-bit status field of a completion: the status, with Do Not Retry where a retry cannot help."""
    return status if status in _RETRY else status | DO_NOT_RETRY


def describe(status: int) -> str:
    """One line for logs and errors: ``0x2f2 OUT_OF_ORDER: not at the write pointer of the chunk``."""
    code = status & 0x7FF
    try:
        member = Status(code)  # type: ignore[call-arg]  # lookup by value, not construction
    except ValueError:
        return f"{code:#05x}"
    return f"{code:#05x} {member.name}: {member.text}"
