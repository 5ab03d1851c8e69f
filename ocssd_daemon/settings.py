"""Owns the settings: every key with its default and its rule, and how text becomes one checked tree.

A key is a path such as ``geometry.chunks``; it means the same in the TOML file, in ``--set`` and in the
control socket. Sources are layered (defaults, preset, file, command line) as flat ``{key: Given}`` tables
and checked key by key, so that an error can name the key, the value, where it came from and the rule. Rules
that span several keys of the geometry are not here but with the geometry itself. A key exists only if
something obeys it.

Units are in the names; keys that end in ``_bytes``, and ``size``, also take text such as ``4K`` or ``1.5G``
(powers of 1024).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta

from ocssd_daemon.nand.geometry import Geometry, GeometryError, validate
from ocssd_daemon.nand.latency import Latency, LatencyError, resolve
from ocssd_daemon.nand.wear import Model

KIB = 1024
SIZE_RULE = "a size such as 512M or 4G"
MIN_CHUNKS_FOR_SIZE = 64  # below this many chunks per PU, `size` makes chunks smaller instead of fewer


class SettingsError(ValueError):
    """A setting that cannot be: one line with key, value, where the value came from, and the rule."""

    def __init__(self, key: str, rule: str, value: object = UNSET, source: str = "") -> None:
        self.key = key
        self.rule = rule
        named = key if value is UNSET else f"{key}={_shown(value)}"
        super().__init__(f"{named}{f' ({source})' if source else ''}: {rule}")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of settings; each field is a key or a table below it."""


def _int(low: int, high: int, text: str) -> Meta:
    return Meta(ge=low, le=high, description=text)


def _number_from(low: float, high: float, text: str) -> Meta:
    return Meta(ge=low, le=high, description=text)


def _text(text: str) -> Meta:
    return Meta(description=text)


class FtlSettings(Section, frozen=True):
    """The host FTL that makes a plain disk of the flash."""

    op: Annotated[float, _number_from(0.02, 9.0, "spare flash as a share of the disk")] = 0.11
    victim: Annotated[
        Literal["greedy", "cost-benefit", "d-choices", "fifo", "random"],
        _text("how garbage collection picks its line"),
    ] = "greedy"
    d_choices: Annotated[int, _int(1, 64, "lines drawn at random by victim d-choices")] = 8
    wear_spread: Annotated[
        int, _int(0, 1 << 24, "P/E cycles between lines that start static wear levelling; 0: never")
    ] = 16
    settle: Annotated[
        float, _number_from(0.0, 1.0, "share of the spare space that is written before greedy takes fresh data")
    ] = 0.5
    frontiers: Annotated[int, _int(1, 2, "open lines: 2 keeps user data and moved data apart")] = 2
    reserve_lines: Annotated[int, _int(2, 1 << 16, "free lines that only garbage collection may use")] = 2
    block_bytes: Annotated[
        Literal[512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
        _text("the disk's logical block: at most a sector"),
    ] = 512
    retire: Annotated[bool, _text("a chunk that lost data is not used again, while spare space lasts")] = True
    pus: Annotated[
        str, _text("parallel units of the disk: all, none, ranges as 0-3,6; auto: none if only raw flash is served")
    ] = "auto"


class LatencySettings(Section, frozen=True):
    """How long the flash takes. Numbers that are set replace the profile's."""

    profile: Annotated[str, _text("none, slc, mlc, tlc, qlc, or a TOML file with the keys below")] = "none"
    sense_ns: Annotated[tuple[int, ...] | int, _text("page to register: one number, or one per page kind")] = ()
    program_ns: Annotated[tuple[int, ...] | int, _text("register to page: one number, or one per page kind")] = ()
    erase_ns: Annotated[int | None, _text("reset of a chunk")] = None
    transfer_ns_per_sector: Annotated[int | None, _text("one sector over the channel of its group")] = None
    controller_ns: Annotated[int | None, _text("overhead of each command")] = None
    buffer_ns: Annotated[int | None, _text("to take a sector into the write buffer")] = None
    buffer_sectors: Annotated[
        int | None, _text("size of the write buffer; 0: none; default: two rows per PU")
    ] = None
    page_sectors: Annotated[int | None, _text("sectors of a flash page; default: geometry.ws_min")] = None
    planes: Annotated[int | None, _text("planes of a PU; default: geometry.ws_opt / page_sectors")] = None
    pairing: Annotated[
        Literal["modulo", "shadow"] | None,
        _text("page kinds of a chunk's rows: shadow (as multi-level flash is programmed) or row modulo kinds"),
    ] = None
    suspend: Annotated[bool | None, _text("a read interrupts a program or an erase")] = None
    suspend_ns: Annotated[int | None, _text("what such an interruption costs")] = None


class FaultSettings(Section, frozen=True):
    """What goes wrong on purpose; docs/faults.md has the language."""

    rules: Annotated[tuple[str, ...], _text("fault rules, such as: on=write chunk=5 do=fail p=0.01")] = ()
    file: Annotated[str | None, _text("file of fault rules, one a line")] = None
    bad: Annotated[
        str | None, _text("factory bad chunks of fresh flash: a number, a percentage, or GROUP/PU/CHUNK,...")
    ] = None
    bad_table: Annotated[str | None, _text("bad-block table file: one byte per block, 0 is good")] = None
    chunk_states: Annotated[str | None, _text("chunk state file for fresh flash (lchunkstate)")] = None
    write_failures: Annotated[str | None, _text("file of sectors whose writes fail (lwritefail)")] = None
    reset_failures: Annotated[str | None, _text("file of chunks whose resets fail (lresetfail)")] = None


class ReactorSettings(Section, frozen=True):
    """The loop that moves all data."""

    poll_us: Annotated[int, _int(0, 1_000_000, "longest time to poll before sleeping; 0 sleeps at once")] = 50


class VhostSettings(Section, frozen=True):
    """vhost-user-blk."""

    socket: Annotated[str | None, _text("path of the Unix socket that QEMU connects to")] = None
    num_queues: Annotated[int, _int(1, 256, "most queues that a guest may use")] = 64
    serial: Annotated[str, Meta(max_length=20, description="serial number that the guest reads")] = "ocssd"


class TlsSettings(Section, frozen=True):
    """TLS for NBD. Files are PEM; for pre-shared keys, lines of identity:hexadecimal-key."""

    mode: Annotated[Literal["off", "allow", "require"], _text("whether clients may, or must, start TLS")] = "off"
    certificate: Annotated[str | None, _text("file with our certificate, and the chain to its issuer")] = None
    key: Annotated[str | None, _text("file with the certificate's key, if that has none in it")] = None
    client_ca: Annotated[str | None, _text("file with the authorities whose clients alone may come")] = None
    psk_file: Annotated[str | None, _text("file with pre-shared keys (needs Python 3.13)")] = None


class NbdSettings(Section, frozen=True):
    """NBD."""

    listen: Annotated[tuple[str, ...], _text("addresses: unix:PATH or tcp:HOST:PORT")] = ()
    export: Annotated[
        str, Meta(min_length=1, max_length=1024, description='name of the export, which is also the default ""')
    ] = "ocssd"
    insecure: Annotated[bool, _text("allow TCP without TLS on an address that is not loopback")] = False
    max_connections: Annotated[int, _int(1, 4096, "clients at once; further ones are turned away")] = 64
    handshake_seconds: Annotated[float, _number_from(0.1, 3600.0, "time for a client to finish negotiating")] = 10.0
    max_payload_bytes: Annotated[int, _int(1 << 20, 64 << 20, "largest request that is taken")] = 32 << 20
    tls: TlsSettings = TlsSettings()


class NvmeSettings(Section, frozen=True):
    """The NVMe controller, served over vfio-user."""

    socket: Annotated[str | None, _text("path of the Unix socket that QEMU's vfio-user-pci connects to")] = None
    namespaces: Annotated[
        tuple[Literal["ocssd20", "ocssd12", "block"], ...],
        Meta(min_length=1, max_length=256, description="one each: ocssd20 or ocssd12 (flash), block (the disk)"),
    ] = ("ocssd20",)
    serial: Annotated[str, Meta(min_length=1, max_length=20, description="serial number")] = "ocssd-0"
    model: Annotated[str, Meta(max_length=40, description="model number")] = "ocssd-daemon"
    firmware: Annotated[str, Meta(max_length=8, description="firmware revision")] = "1.0"
    vid: Annotated[int, _int(0, 0xFFFF, "PCI vendor; Linux binds lightnvm to 0x1d1d")] = 0x1D1D
    did: Annotated[int, _int(0, 0xFFFF, "PCI device; Linux binds lightnvm to 0x1f1f")] = 0x1F1F
    write_cache: Annotated[bool, _text("a volatile write cache; without it every write is as after a flush")] = True
    mpsmax: Annotated[int, _int(0, 4, "largest memory page of the host: 4 KiB << this")] = 0
    coalesce_commands: Annotated[int, _int(0, 255, "completions, less 1, that share an interrupt at first")] = 0
    coalesce_us: Annotated[int, _int(0, 25_500, "longest time that one waits for others; steps of 100; 0: never")] = 0
    mdts: Annotated[int, _int(0, 16, "largest transfer: 2^mdts pages of 4 KiB; 0: no limit")] = 7
    queues: Annotated[int, _int(1, 2047, "I/O queue pairs")] = 64
    entries: Annotated[int, _int(2, 65536, "most entries of one queue")] = 1024
    aerl: Annotated[int, _int(0, 255, "asynchronous event requests at once, less 1")] = 3
    acl: Annotated[int, _int(0, 255, "Abort commands at once, less 1")] = 3
    error_entries: Annotated[int, _int(1, 64, "entries of the error log")] = 64
    stride: Annotated[int, _int(0, 12, "doorbells lie 4 << stride bytes apart")] = 0
    doorbells: Annotated[
        Literal["trapped", "mapped"],
        _text("trapped: register writes, or shadow doorbells; mapped: the guest writes our memory, and we poll it"),
    ] = "trapped"
    shadow_doorbells: Annotated[bool, _text("with trapped ones: offer doorbells in the guest's memory (DBBUF)")] = True
    planes: Annotated[Literal[1, 2, 4], _text("OCSSD 1.2: planes; a block of one plane is one chunk")] = 1
    dlfeat: Annotated[Literal[0, 1, 2], _text("unwritten sectors read as: 1 zeroes, 2 ones, 0 not said (zeroes)")] = 1
    wear_threshold: Annotated[int, _int(0, 255, "wear index off the mean that is notified (WIT); 0: never")] = 0
    early_reset: Annotated[bool, _text("an open chunk may be reset; pblk needs it")] = True
    multi_reset: Annotated[bool, _text("a free chunk may be reset (MCCAP bit 1)")] = False
    bad_block_file: Annotated[str | None, _text("OCSSD 1.2: a byte per block and plane, non-zero is bad")] = None


class ControlSettings(Section, frozen=True):
    """The control socket."""

    socket: Annotated[str | None, _text("path of its Unix socket; default: first transport's + .ctl")] = None


class Settings(Section, frozen=True):
    """Everything that can be set."""

    size: Annotated[
        int | None, _text("raw flash in bytes: sets geometry.chunks, and for small devices geometry.sectors")
    ] = None
    store: Annotated[str | None, _text("image file that keeps the flash; default: RAM")] = None
    durability: Annotated[
        Literal["process", "host"], _text("what FLUSH survives: a crash of this process, or one of the host")
    ] = "process"
    read_only: Annotated[bool, _text("refuse every write")] = False
    seed: Annotated[int, _int(0, (1 << 63) - 1, "seed of everything random")] = 0
    geometry: Geometry = Geometry()
    ftl: FtlSettings = FtlSettings()
    age: Annotated[
        str | None, _text("a used drive instead of a fresh one: life=90%,fill=80%,retention=180d,seed=7")
    ] = None
    latency: LatencySettings = LatencySettings()
    wear: Model = Model()
    faults: FaultSettings = FaultSettings()
    reactor: ReactorSettings = ReactorSettings()
    vhost: VhostSettings = VhostSettings()
    nbd: NbdSettings = NbdSettings()
    nvme: NvmeSettings = NvmeSettings()
    control: ControlSettings = ControlSettings()


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {  # small enough to draw on a board
        "geometry.groups": 1,
        "geometry.pus": 4,
        "geometry.chunks": 64,
        "geometry.sectors": 64,
    },
    "pblk-20": {  # what Linux's pblk likes: many lines, a write unit that fits MDTS, and to read all that it wrote
        "geometry.chunks": 128,
        "geometry.sectors": 512,
        "geometry.mw_cunits": 0,
        "nvme.namespaces": ["ocssd20"],
    },
    "pblk-12": {  # two planes: a block of the guest is two chunks, a flash page is ws_min sectors
        "geometry.chunks": 256,
        "geometry.sectors": 256,
        "geometry.mw_cunits": 0,
        "nvme.namespaces": ["ocssd12"],
        "nvme.planes": 2,
    },
    "reference-20": {  # as `qemu-img create -f ocssd` without options made it
        "geometry.groups": 2,
        "geometry.pus": 8,
        "geometry.chunks": 60,
        "geometry.sectors": 4096,
        "geometry.ws_min": 4,
        "geometry.ws_opt": 8,
        "geometry.mw_cunits": 24,
        "nvme.namespaces": ["ocssd20"],
        "nvme.serial": "deadbeef",
    },
    "reference-12": {  # lver=1 and a 1 GiB file: 1 LUN, 1 plane, 256 pages of one sector a block
        "geometry.groups": 1,
        "geometry.pus": 1,
        "geometry.chunks": 1022,  # 8 bytes of each sector are set aside
        "geometry.sectors": 256,
        "geometry.ws_min": 1,
        "geometry.ws_opt": 1,
        "geometry.mw_cunits": 0,
        "nvme.namespaces": ["ocssd12"],
        "nvme.mdts": 10,
        "nvme.serial": "deadbeef",
    },
    "wide": {  # as many parallel units as a data-centre drive
        "geometry.groups": 8,
        "geometry.pus": 8,
        "geometry.chunks": 128,
        "geometry.sectors": 1024,
    },
}


class Given(NamedTuple):
    """A value that somebody set, and where."""

    value: Any
    source: str


Layer = Mapping[str, Given]


class Leaf(NamedTuple):
    """One key: its type with its rule, and its default."""

    type: Any
    default: Any


def _walk(section: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    for field in msgspec.structs.fields(section):
        key = prefix + field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _walk(field.type, key + ".")
        else:
            yield key, Leaf(field.type, field.default)


KEYS: dict[str, Leaf] = dict(_walk(Settings))


# Sources: each becomes a flat table of what it sets.


def from_preset(name: str) -> dict[str, Given]:
    """The settings of a preset. Raises SettingsError for an unknown name."""
    if name not in PRESETS:
        raise SettingsError("preset", f"no such preset; there are {', '.join(PRESETS)}", name)
    return {key: Given(value, f"preset {name}") for key, value in PRESETS[name].items()}


def from_toml(path: str) -> dict[str, Given]:
    """The settings of a TOML file. Raises SettingsError if it cannot be read or parsed."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError("config", error.strerror or str(error), path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError("config", str(error), path) from None
    return dict(_flatten(tree, path))


def _flatten(table: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Given]]:
    for name, value in table.items():
        if isinstance(value, dict) and prefix + name not in KEYS:
            yield from _flatten(value, source, prefix + name + ".")
        else:
            yield prefix + name, Given(value, source)


def from_assignments(texts: Iterable[str]) -> dict[str, Given]:
    """The settings of ``--set key=value`` arguments. Raises SettingsError if one is no assignment."""
    layer = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SettingsError("--set", "must be key=value", text)
        layer[key.strip()] = Given(value.strip(), "--set")
    return layer


# Checks.


def build(*layers: Layer) -> Settings:
    """The settings tree of *layers*, later ones first in force. Raises SettingsError."""
    given: dict[str, Given] = {}
    for layer in layers:
        given.update(layer)
    values = {key: check(key, one) for key, one in given.items()}
    if values.get("store") == "":
        raise SettingsError("store", "must be a path", *given["store"])
    if values.get("size") is not None:
        values.update(_geometry_for_size(values, given))
    settings = msgspec.convert(_nested(values), Settings)
    _check_geometry(settings.geometry, given)
    _check_latency(settings, given)
    return settings


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        table = tree
        for step in path:
            table = table.setdefault(step, {})
        table[name] = value
    return tree


def _check_geometry(geometry: Geometry, given: Layer) -> None:
    try:
        validate(geometry)
    except GeometryError as error:
        key = f"geometry.{error.field}"
        source = given[key].source if key in given else ""
        raise SettingsError(
            key, str(error).partition(": ")[2], getattr(geometry, error.field), source
        ) from None


def named(*layers: Layer) -> frozenset[str]:
    """The keys that somebody set: where a default would be bent to fit, these are kept or refused."""
    return frozenset().union(*layers)


def latency_of(settings: Settings, geometry: Geometry) -> Latency | None:
    """The latency numbers in force for *geometry*; None: everything ends at once. Raises SettingsError."""
    numbers = msgspec.structs.asdict(settings.latency)
    try:
        return resolve(numbers.pop("profile"), numbers, geometry)
    except LatencyError as error:
        raise SettingsError(f"latency.{error.key}", str(error), getattr(settings.latency, error.key)) from None


def _check_latency(settings: Settings, given: Layer) -> None:
    try:
        latency_of(settings, settings.geometry)
    except SettingsError as error:
        if error.key in given:
            raise SettingsError(error.key, error.rule, *given[error.key]) from None
        raise


def names_geometry(keys: Iterable[str]) -> bool:
    """Whether a shape of flash was asked for, so that an image of another shape is a mistake."""
    return any(key == "size" or key.startswith("geometry.") for key in keys)


def check(key: str, given: Given) -> Any:
    """The value of one setting, by its own rule. Raises SettingsError."""
    leaf = KEYS.get(key)
    if leaf is None:
        raise SettingsError(key, f"no such setting{_near_miss(key)}", given.value, given.source)
    is_text = isinstance(given.value, str)
    try:
        return msgspec.convert(_from_text(key, leaf, given.value), leaf.type, strict=not is_text)
    except (msgspec.ValidationError, ValueError):
        words = SIZE_RULE if key == "size" else rule(leaf.type)
        raise SettingsError(key, f"must be {words}", given.value, given.source) from None


def _near_miss(key: str) -> str:
    """A suggestion: the same last name in another table, else the key that is spelled most like it."""
    below = [k for k in KEYS if k.startswith(key + ".")]
    if below:
        return f"; it is a table with {', '.join(below)}"
    name = key.rpartition(".")[2]
    close = [k for k in KEYS if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, KEYS, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _from_text(key: str, leaf: Leaf, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if key == "size" or key.endswith("_bytes"):
        return parse_size(value)
    if isinstance(leaf.default, tuple):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``4096``, ``4K``, ``1.5GiB``: suffixes are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    size = float(match[1]) * KIB ** " KMGTP".index(match[2].upper() or " ")
    if size != int(size):
        raise ValueError(text)
    return int(size)


def _geometry_for_size(values: dict[str, Any], given: Layer) -> dict[str, int]:
    """``geometry.chunks`` (and ``.sectors``) that make the raw flash at least ``size`` bytes."""
    if "geometry.chunks" in given and given["geometry.chunks"].source in ("--set", given["size"].source):
        raise SettingsError("size", "geometry.chunks is set too; give one of them", *given["size"])
    shape = {
        name: values.get(f"geometry.{name}", KEYS[f"geometry.{name}"].default)
        for name in ("groups", "pus", "sectors", "sector_bytes", "ws_opt")
    }
    if any(count < 1 for count in shape.values()):
        return {}  # the geometry's own rules name the one that cannot be
    row_bytes = shape["groups"] * shape["pus"] * shape["sector_bytes"]
    sectors = shape["sectors"]
    smallest = shape["sectors"] if "geometry.sectors" in given else 4 * shape["ws_opt"]
    enough_bytes = values["size"] / MIN_CHUNKS_FOR_SIZE
    while sectors * row_bytes > enough_bytes and sectors % 2 == 0 and sectors // 2 >= smallest:
        sectors //= 2
    chunks = -(-values["size"] // (sectors * row_bytes))
    if not 1 <= chunks <= 1 << 24:
        raise SettingsError("size", "no number of chunks of this geometry makes it", *given["size"])
    return {"geometry.chunks": chunks, "geometry.sectors": sectors}


# Words for people.


def _shown(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def rule(annotation: Any) -> str:
    """What a value of this type must be, in words."""
    from msgspec import inspect  # needed only when something is wrong: keep it out of the start-up time

    return _rule(inspect.type_info(annotation))


def _rule(info: Any) -> str:
    if type(info).__name__ == "Metadata":
        return _rule(info.type)
    return _RULES[type(info).__name__](info)


def _number(noun: str) -> Any:
    def words(info: Any) -> str:
        if info.ge is None or info.le is None:
            return noun
        return f"{noun} from {info.ge} to {info.le}"

    return words


_RULES: dict[str, Any] = {
    "IntType": _number("an integer"),
    "FloatType": _number("a number"),
    "BoolType": lambda info: "true or false",
    "StrType": lambda info: f"text of at most {info.max_length} characters" if info.max_length else "text",
    "NoneType": lambda info: "nothing",
    "LiteralType": lambda info: f"one of {', '.join(map(str, info.values))}",
    "VarTupleType": lambda info: f"a list of {_rule(info.item_type)}",
    "UnionType": lambda info: " or ".join(_rule(t) for t in info.types if type(t).__name__ != "NoneType"),
}


def json_schema() -> dict[str, Any]:
    """JSON Schema of the tree, for editors and for the documentation."""
    return msgspec.json.schema(Settings)
