"""What the troubleshooting page quotes is what the programs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit.daemon import ROOT, daemon, run_daemon
from tests.kit.reference_image import ReferenceWriter

PAGE = (ROOT / "docs/troubleshooting.md").read_text()


def quoted(words: str) -> None:
    """The page has this message in its table of refusals."""
    assert words in PAGE, words


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "no transport named"),
    (["--vfio-user", "s", "--set", "nvme.namespaces=ocssd20,ocssd20,ocssd20"], "cannot share"),
    (["--vfio-user", "s", "--set", "nvme.namespaces=ocssd12", "--set", "geometry.pus=3"],
     "OCSSD 1.2 needs a power of two"),
    (["--nbd", "unix:s", "--set", "ftl.pus=none"], "ftl.pus: the host FTL owns no parallel unit"),
    (["--nbd", "unix:nowhere/s"], "No such file or directory"),
])
def test_a_refusal_is_quoted_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                      says: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_daemon(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr
    quoted(says)
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_images_and_sockets_that_are_taken(tmp_path: Path) -> None:
    image, foreign, old = tmp_path / "image", tmp_path / "foreign", tmp_path / "old"
    foreign.write_bytes(b"my thesis")
    ReferenceWriter(old)
    nbd = f"unix:{tmp_path}/nbd"
    with daemon(tmp_path, "--nbd", nbd, "--store", image, "--size", "64M"):
        for arguments, says in (
            (["--nbd", "unix:-", "--store", image], "in use by another process"),
            (["--nbd", nbd], "a running server listens there"),
            (["--nbd", "unix:-", "--store", foreign], "holds something that is not an image of this program"),
            (["--nbd", "unix:-", "--store", old], "is an image of the reference emulator"),
        ):
            assert says in run_daemon(*arguments).stderr
            quoted(says)
    assert "the image was made with geometry." in run_daemon(
        "--nbd", "unix:-", "--store", image, "--set", "geometry.pus=2").stderr
    quoted("the image was made with geometry.X")
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 1)
    assert "is cut short" in run_daemon("--nbd", "unix:-", "--store", image).stderr
    quoted("is cut short")


def test_every_bug_of_qemus_client_has_its_row() -> None:
    rows = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert rows == [str(i) for i in range(1, 11)]
