"""Owns one act: resolve Debian packages of any suite and unpack them below a directory, without root.

apt resolves and verifies with a private configuration, state and an empty package database, so the host's own
packages do not count and are never touched; `dpkg -x` unpacks. No maintainer script runs: what comes out is
files, not an installed system. Knows nothing of guests or of QEMU.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
INHERITED_SETTINGS = ("Acquire::http", "Acquire::https", "Acquire::Retries")


class PackagesError(Exception):
    """The packages cannot be had; the text is one line for the user."""


@dataclass(frozen=True)
class Selection:
    """What to fetch: *packages* from *suite*; those that match *backported* (globs) from SUITE-backports."""

    suite: str
    packages: tuple[str, ...]
    backported: tuple[str, ...] = ()

    def sources(self) -> str:
        suites = [self.suite, *([f"{self.suite}-backports"] if self.backported else [])]
        return "".join(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in suites)

    def preferences(self) -> str:
        if not self.backported:
            return ""
        pin = f"Pin: release n={self.suite}-backports\nPin-Priority: 990"
        return f"Package: {' '.join(self.backported)}\n{pin}\n"


def mirror() -> str:
    return os.environ.get("OCSSD_DEBIAN_MIRROR", DEFAULT_MIRROR)


def cache_home() -> Path:
    """Where things made from packages are kept: ``$OCSSD_CACHE``, else the project's ``.cache/``."""
    default = Path(__file__).resolve().parent.parent / ".cache"
    return Path(os.environ.get("OCSSD_CACHE", default))


def run(argv: Sequence[str], **options: object) -> None:
    """Run *argv* silently; its last lines become the error."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
    if done.returncode:
        tail = done.stdout.decode(errors="replace").strip().splitlines()[-5:]
        raise PackagesError(f"{argv[0]} failed ({done.returncode}): " + " | ".join(tail))


@contextmanager
def built_once(target: Path, key: str) -> Iterator[Path | None]:
    """Yield an empty directory to build *target* in, or None if it is there already, built from the same
    *key*.

    Holds a lock file beside the target meanwhile, so of two builders one waits and finds the work done. The
    result appears by rename: a build that dies leaves nothing that looks finished.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp = target / ".made-from"
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == key:
            yield None
            return
        staging = target.with_name(target.name + ".new")
        for stale in (staging, target):
            shutil.rmtree(stale, ignore_errors=True)
        staging.mkdir()
        yield staging
        (staging / ".made-from").write_text(key)
        staging.rename(target)


def fetch(selection: Selection, work: Path) -> list[Path]:
    """Download *selection* and all it depends on into *work*; returns the .deb files."""
    for program in ("apt-get", "apt-config", "dpkg-deb"):
        if shutil.which(program) is None:
            raise PackagesError(f"needs {program}, which Debian and Ubuntu have")
    if not KEYRING.exists():
        raise PackagesError(f"needs {KEYRING}: apt-get install debian-archive-keyring")
    environment = {**os.environ, "APT_CONFIG": str(_private_apt(selection, work)), "LC_ALL": "C"}
    run(["apt-get", "-q", "update"], env=environment)
    run(["apt-get", "-qy", "--download-only", "install", *selection.packages], env=environment)
    return sorted((work / "archives").glob("*.deb"))


def unpack(debs: Sequence[Path], root: Path) -> None:
    """Unpack *debs* below *root*, laid out with a merged /usr as Debian's base-files does at installation."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    extract = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)]
    for deb in debs:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as source:
            run(extract, stdin=source.stdout)


def make_root(selection: Selection, root: Path) -> None:
    """Fetch and unpack *selection* below *root*; the downloads are not kept."""
    work = root.with_name(root.name + ".apt")
    shutil.rmtree(work, ignore_errors=True)
    try:
        unpack(fetch(selection, work), root)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def command(main: object) -> None:
    """Run a tool's main(): one line on stderr and exit code 1 for what it cannot have."""
    try:
        main()  # type: ignore[operator]
    except PackagesError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def _private_apt(selection: Selection, work: Path) -> Path:
    for name in ("lists/partial", "archives/partial", "preferences.d"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(selection.sources())
    (work / "preferences").write_text(selection.preferences())
    settings = {
        "Dir::State": str(work),
        "Dir::State::lists": str(work / "lists"),
        "Dir::State::status": str(work / "status"),
        "Dir::Cache": str(work),
        "Dir::Cache::archives": str(work / "archives"),
        "Dir::Etc": str(work),
        "Dir::Etc::sourcelist": str(work / "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": str(work / "preferences"),
        "Dir::Etc::preferencesparts": str(work / "preferences.d"),
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
    }
    lines = [f'{key} "{value}";' for key, value in settings.items()]
    config = work / "apt.conf"
    config.write_text("\n".join([*_inherited(), *lines]) + "\n")
    return config


def _inherited() -> list[str]:
    """The host's proxy settings: they live in the configuration that the private one leaves out."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    return [line for line in dump.splitlines() if line.startswith(INHERITED_SETTINGS) and '""' not in line]
