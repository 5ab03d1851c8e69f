"""TLS: what goes through the pump arrives, who may come in, and what is refused at the start."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path

import pytest

from ocssd_daemon.settings import Given, NbdSettings, SettingsError, build
from ocssd_daemon.transport import nbd_tls
from ocssd_daemon.transport.listen import Listener, TcpAddress, UnixAddress
from ocssd_daemon.transport.nbd import check_exposure
from tests.kit import nbd_client as nbd
from tests.kit.certs import Authority
from tests.kit.nbd_client import NbdClient
from tests.kit.nbd_server import NbdServer, nbd_server
from tests.kit.requires import requires

MIB = 1 << 20


def settings(**given: object) -> NbdSettings:
    return build({f"nbd.{key.replace('__', '.')}": Given(value, "test") for key, value in given.items()}).nbd


def over_tls(server: NbdServer, authority: Authority) -> NbdClient:
    """A client in the transmission phase with extended headers, all of it encrypted."""
    client = server.client()
    client.greet()
    assert client.ask(nbd.OPT_STARTTLS)[0] == nbd.REP_ACK
    context = ssl.create_default_context(cafile=authority.certificate)
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    client.ask(nbd.OPT_EXTENDED)
    client.structured = client.extended = True
    assert client.go() == nbd.REP_ACK
    return client


def tls_server(directory: Path, authority: Authority, **more: object):  # type: ignore[no-untyped-def]
    pair = authority.sign("localhost")
    return nbd_server(
        directory, nbd__tls__mode="require", nbd__tls__certificate=pair.certificate, nbd__tls__key=pair.key, **more
    )


def test_requests_of_all_sizes_pass_through_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    with tls_server(tmp_path, authority) as server, over_tls(server, authority) as client:
        for size in (512, 4096, 65536, 4 * MIB, 32 * MIB):
            data = os.urandom(size)
            assert client.write(0, data) == 0
            assert client.read(0, size) == data


def test_pipelined_requests_are_all_answered_before_a_disconnect_ends_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    with tls_server(tmp_path, authority) as server, over_tls(server, authority) as client:
        client.send(b"".join(client.request(nbd.READ, 0, 65536) for _ in range(100)) + client.request(nbd.DISC))
        assert all(len(client.reply().data) == 65536 for _ in range(100))
        assert client.is_closed()


def test_a_tls_client_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    with tls_server(tmp_path, authority) as server:
        tasks = server.task_count()
        with over_tls(server, authority) as client:
            client.send(client.request(nbd.READ, 0, 32 * MIB))
        server.wait(lambda: server.tasks_now() == tasks, "its tasks have ended")


def test_libnbd_comes_in_with_a_client_certificate(tmp_path: Path) -> None:
    nbdinfo = requires("nbdinfo", "libnbd-bin")
    authority = Authority(tmp_path, "ca")
    with tls_server(tmp_path, authority, nbd__tls__client_ca=authority.certificate, host="127.0.0.1") as server:
        pki = tmp_path / "pki"
        pki.mkdir()
        client = authority.sign("client")
        for name, path in [
            ("ca-cert.pem", authority.certificate),
            ("client-cert.pem", client.certificate),
            ("client-key.pem", client.key),
        ]:
            (pki / name).symlink_to(path)
        uri = f"nbds://localhost:{server.port}/?tls-certificates={pki}"
        done = subprocess.run([nbdinfo, uri], capture_output=True, text=True, timeout=30)
        assert "with TLS" in done.stdout, done.stderr
        (pki / "client-cert.pem").unlink()
        (pki / "client-key.pem").unlink()
        assert subprocess.run([nbdinfo, uri], capture_output=True, timeout=30).returncode != 0


@pytest.mark.parametrize(
    ("address", "given", "refused"),
    [
        (UnixAddress("/x"), {}, False),
        (TcpAddress("127.0.0.1", 1), {}, False),
        (TcpAddress("::1", 1), {}, False),
        (TcpAddress("localhost", 1), {}, False),
        (TcpAddress("", 1), {}, True),
        (TcpAddress("0.0.0.0", 1), {}, True),
        (TcpAddress("disk.example.org", 1), {}, True),
        (TcpAddress("192.0.2.1", 1), {"tls__mode": "allow"}, True),  # clear text would still be served
        (TcpAddress("192.0.2.1", 1), {"tls__mode": "require"}, False),
        (TcpAddress("0.0.0.0", 1), {"insecure": True}, False),
    ],
)
def test_a_network_address_without_tls_is_refused(
    address: UnixAddress | TcpAddress, given: dict[str, object], refused: bool
) -> None:
    if not refused:
        check_exposure(Listener(address, []), settings(**given))
        return
    with pytest.raises(SettingsError, match="--insecure"):
        check_exposure(Listener(address, []), settings(**given))


def test_tls_without_a_certificate_is_refused_with_the_name_of_the_setting(tmp_path: Path) -> None:
    with pytest.raises(nbd_tls.TlsError, match=r"nbd\.tls\.certificate"):
        nbd_tls.make_context(settings(tls__mode="require").tls)
    missing = settings(tls__mode="require", tls__certificate=str(tmp_path / "none.pem"))
    with pytest.raises(nbd_tls.TlsError, match="No such file"):
        nbd_tls.make_context(missing.tls)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("this is no certificate")
    with pytest.raises(nbd_tls.TlsError, match=r"garbage\.pem"):
        nbd_tls.make_context(settings(tls__certificate=str(garbage)).tls)


# Pre-shared keys.


def test_keys_are_read_as_psktool_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who\nalice:00ff\nbob:with:colon:0102\n\n")
    assert nbd_tls.read_keys(str(path)) == {"alice": b"\x00\xff", "bob:with:colon": b"\x01\x02"}


@pytest.mark.parametrize("text", ["", "alice", "alice:", ":00ff", "alice:xyz"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(nbd_tls.TlsError, match=r"nbd\.tls\.psk_file"):
        nbd_tls.read_keys(str(path))


def test_an_unknown_identity_has_no_key() -> None:
    lookup = nbd_tls.key_lookup({"alice": b"key"})
    assert [lookup("alice"), lookup("mallory"), lookup(None)] == [b"key", b"", b""]


def test_keys_are_refused_where_python_cannot_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_tls, "HAS_PSK", False)
    with pytest.raises(nbd_tls.TlsError, match=r"Python 3\.13"):
        nbd_tls.make_context(settings(tls__mode="require", tls__psk_file=str(tmp_path / "keys")).tls)


if nbd_tls.HAS_PSK:

    @pytest.mark.parametrize(("key", "comes_in"), [("00112233445566778899aabbccddeeff", True), ("00" * 16, False)])
    def test_libnbd_comes_in_with_the_right_key_only(tmp_path: Path, key: str, comes_in: bool) -> None:
        nbdinfo = requires("nbdinfo", "libnbd-bin")
        ours, theirs = tmp_path / "server.psk", tmp_path / "client.psk"
        ours.write_text("alice:00112233445566778899aabbccddeeff\n")
        theirs.write_text(f"alice:{key}\n")
        with nbd_server(tmp_path, nbd__tls__mode="require", nbd__tls__psk_file=str(ours)) as server:
            uri = f"nbds+unix://alice@/?socket={server.path}&tls-psk-file={theirs}"
            done = subprocess.run([nbdinfo, uri], capture_output=True, text=True, timeout=30)
            assert (done.returncode == 0) == comes_in, done.stderr
