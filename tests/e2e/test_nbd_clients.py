"""Stock NBD clients against the daemon as a process: libnbd's tools, qemu-img and qemu-io, python3-libnbd, fio."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.daemon import Daemon, daemon
from tests.kit.qemu import Qemu, current_qemu, host_qemu
from tests.kit.requires import requires

MIB = 1 << 20
TIMEOUT_S = 120
SEED = 20260101


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "nbd.sock"


@pytest.fixture
def served(tmp_path: Path, socket_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--nbd", f"unix:{socket_path}", "--size", "512M") as running:
        yield running


@pytest.fixture
def uri(served: Daemon, socket_path: Path) -> str:
    return f"nbd+unix:///?socket={socket_path}"


def run(program: str, package: str, *arguments: object) -> str:
    """What a stock program prints; it must succeed."""
    done = subprocess.run(
        [requires(program, package), *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{program}: {done.stderr}"
    return done.stdout


def random_file(path: Path, size_bytes: int) -> Path:
    """Data that compresses to nothing in no client, with two holes, the same each time."""
    print(f"seed={SEED}")
    data = bytearray(random.Random(SEED).randbytes(size_bytes))
    for hole in (size_bytes // 4, size_bytes // 2):
        data[hole : hole + MIB] = bytes(MIB)
    path.write_bytes(data)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_nbdinfo_shows_what_the_export_can_do(uri: str) -> None:
    told = json.loads(run("nbdinfo", "libnbd-bin", "--json", uri))
    export = told["exports"][0]
    able = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
    assert [export[f"can_{what}"] for what in able] == [True] * len(able)
    assert not export["is_read_only"]
    assert not export["is_rotational"]
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (512, 4096)
    assert export["block_size_maximum"] == 32 * MIB
    assert "Open-Channel SSD" in export["description"]
    assert set(export["contexts"]) == {"base:allocation", "x-ocssd:chunk-state"}


def test_nbdinfo_lists_the_export_by_its_name(uri: str) -> None:
    told = json.loads(run("nbdinfo", "libnbd-bin", "--list", "--json", uri))
    assert [export["export-name"] for export in told["exports"]] == ["ocssd"]
    assert set(told["exports"][0]["contexts"]) == {"base:allocation", "x-ocssd:chunk-state"}


@pytest.mark.parametrize("what", ["write", "trim", "zero", "fast-zero", "flush", "fua", "multi-conn", "structured"])
def test_nbdinfo_can(uri: str, what: str) -> None:
    run("nbdinfo", "libnbd-bin", "--can", what, uri)


def test_nbdcopy_brings_back_what_it_wrote(uri: str, tmp_path: Path) -> None:
    source, back = random_file(tmp_path / "source", 64 * MIB), tmp_path / "back"
    run("nbdcopy", "libnbd-bin", source, uri)
    run("nbdcopy", "libnbd-bin", uri, back)
    with open(back, "rb+") as file:
        file.truncate(64 * MIB)  # the disk is larger than what was written
    assert digest(back) == digest(source)


def test_nbdinfo_maps_holes_and_data(uri: str, tmp_path: Path) -> None:
    run("nbdcopy", "libnbd-bin", "--destination-is-zero", random_file(tmp_path / "source", 8 * MIB), uri)
    told = json.loads(run("nbdinfo", "libnbd-bin", "--map", "--json", uri))
    kinds = [(extent["offset"], extent["length"], extent["type"]) for extent in told]
    size = int(run("nbdinfo", "libnbd-bin", "--size", uri))
    assert kinds == [
        (0, 2 * MIB, 0),
        (2 * MIB, MIB, 3),
        (3 * MIB, MIB, 0),
        (4 * MIB, MIB, 3),
        (5 * MIB, 3 * MIB, 0),
        (8 * MIB, size - 8 * MIB, 3),
    ]


def test_nbdinfo_maps_the_states_of_chunks(uri: str, tmp_path: Path) -> None:
    run("nbdcopy", "libnbd-bin", random_file(tmp_path / "source", 64 * MIB), uri)
    told = json.loads(run("nbdinfo", "libnbd-bin", "--map=x-ocssd:chunk-state", "--json", uri))
    states = {extent["type"] for extent in told}
    assert {0, 2} <= states <= {0, 1, 2, 4}  # nothing there, closed; and where the last write ended: free or open


@pytest.fixture(params=[host_qemu, current_qemu], ids=["host", "current"])
def qemu(request: pytest.FixtureRequest) -> Qemu:
    """Both generations: the current one negotiates extended headers."""
    return request.param()  # type: ignore[no-any-return]


def qemu_program(qemu: Qemu, program: str, *arguments: object) -> str:
    done = subprocess.run(
        [qemu.sibling(program), *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_qemu_img_converts_compares_and_maps(qemu: Qemu, uri: str, tmp_path: Path) -> None:
    source = random_file(tmp_path / "source", 32 * MIB)
    qemu_program(qemu, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    assert "identical" in qemu_program(qemu, "qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    mapped = json.loads(qemu_program(qemu, "qemu-img", "map", "--output=json", "-f", "raw", uri))
    holes = [(extent["start"], extent["length"]) for extent in mapped if extent["zero"]]
    assert holes[:2] == [(8 * MIB, MIB), (16 * MIB, MIB)]


def test_qemu_io_writes_zeroes_discards_and_reads_patterns(qemu: Qemu, uri: str) -> None:
    commands = [
        "write -P 0xa5 0 1M",
        "write -f -P 0x5a 1M 512",  # FUA, one 512-byte block of a 4 KiB sector
        "read -P 0x5a 1M 512",
        "read -P 0 1049088 3584",
        "write -z 64k 64k",  # without -u: NO_HOLE
        "write -z -u 256k 64k",
        "read -P 0 64k 64k",
        "read -P 0 256k 64k",
        "read -P 0xa5 0 64k",
        "discard 512k 512k",
        "flush",
        "read -P 0xa5 128k 128k",
    ]
    said = qemu_program(qemu, "qemu-io", "-f", "raw", *(word for line in commands for word in ("-c", line)), uri)
    assert "failed" not in said


LIBNBD_SCRIPT = """
import sys, nbd
path = sys.argv[1]

def handle():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(path)
    return h

h = handle()
names = []
h.opt_list(lambda name, description: names.append(name) and 0)
assert names == ["ocssd"], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name) and 0)
assert set(contexts) == {"base:allocation", "x-ocssd:chunk-state"}, contexts
h.set_export_name("nothing")
try:
    h.opt_info()
    raise SystemExit("an unknown export was found")
except nbd.Error:
    pass
h.set_export_name("ocssd")
h.add_meta_context("base:allocation")
h.add_meta_context("x-ocssd:chunk-state")
h.opt_go()
assert h.get_structured_replies_negotiated() and h.get_protocol() == "newstyle-fixed"

data = bytes(range(256)) * 256
h.pwrite(data, 65536, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 65536, ) == data
seen = []
h.pread_structured(131072, 0, lambda buf, offset, status, error: seen.append((offset, len(buf))) and 0, nbd.CMD_FLAG_DF)
assert len(seen) == 1, seen
seen.clear()
h.pread_structured(262144, 0, lambda buf, offset, status, error: seen.append((offset, len(buf), status)) and 0)
hole, data_chunk = nbd.READ_HOLE, nbd.READ_DATA
assert seen == [(0, 65536, hole), (65536, 65536, data_chunk), (131072, 131072, hole)], seen
h.zero(4096, 65536, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 65536) == bytes(4096)
h.trim(8192, 69632)
h.cache(65536, 0)
extents = {}
def extent(context, offset, entries, error):
    extents[context] = list(entries)
    return 0
h.block_status(262144, 0, extent)
assert extents["base:allocation"] == [65536 + 12288, 3, 65536 - 12288, 0, 131072, 3], extents
h.block_status(262144, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert extents["base:allocation"] == [65536 + 12288, 3], extents

h.set_strict_mode(0)    # now what the library would refuse to send
for call in (lambda: h.pread(512, h.get_size()), lambda: h.pread(1, 1), lambda: h.pwrite(b"x" * 512, 1 << 62),
             lambda: h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE), lambda: h.pread(64 << 20, 0)):
    try:
        call()
        raise SystemExit("an invalid request was taken")
    except nbd.Error as error:
        assert error.errnum, error
assert h.pread(512, 131072 - 512) == data[-512:]
h.flush()
h.shutdown()

h = handle()
h.opt_abort()
"""


def test_libnbd_drives_options_and_invalid_requests(uri: str, socket_path: Path) -> None:
    script = [requires("/usr/bin/python3", "python3"), "-c", LIBNBD_SCRIPT, str(socket_path)]
    probe = subprocess.run([script[0], "-c", "import nbd"], capture_output=True)
    if probe.returncode:
        requires("python3-libnbd", "python3-libnbd")
    done = subprocess.run(script, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fio_verifies_what_it_wrote_through_four_connections(uri: str, served: Daemon) -> None:
    fio = requires("fio", "fio")
    if "nbd" not in subprocess.run([fio, "--enghelp"], capture_output=True, text=True).stdout.split():
        requires("fio-with-nbd-engine", "fio")
    job = ["--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512"]
    job += ["--size=16M", "--numjobs=4", "--offset_increment=16M", "--iodepth=16"]
    job += ["--verify=crc32c", f"--randseed={SEED}"]
    run("fio", "fio", *job, "--verify_fatal=1", "--verify_state_save=0", "--fsync=200")
    counters = served.ask("stats")["transports"]["nbd"]
    assert counters["errors"] == 0
    assert counters["connections"] >= 4
    assert counters["bytes_read"] >= 64 * MIB


def test_the_nbd_plugin_of_nbdkit_serves_the_disk_on(uri: str, tmp_path: Path, socket_path: Path) -> None:
    """A second server as our client: what a client writes to it arrives here."""
    nbdkit, inner = requires("nbdkit", "nbdkit"), random_file(tmp_path / "source", 8 * MIB)
    copy = f"{requires('nbdcopy', 'libnbd-bin')} {inner} $uri"
    subprocess.run(
        [nbdkit, "-U", "-", "nbd", f"socket={socket_path}", "--run", copy], check=True, timeout=TIMEOUT_S
    )
    back = tmp_path / "back"
    run("nbdcopy", "libnbd-bin", uri, back)
    with open(back, "rb+") as file:
        file.truncate(8 * MIB)
    assert digest(back) == digest(inner)
