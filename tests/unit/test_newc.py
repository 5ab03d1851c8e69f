"""The cpio writer that puts jobs into initramfs images."""

from __future__ import annotations

import stat
from pathlib import Path

from tools.newc import member, trailer, tree


def test_a_member_is_header_name_and_data_each_padded_to_four_bytes() -> None:
    assert member("a", stat.S_IFREG | 0o755, b"hi", inode=1) == (
        b"070701"
        b"00000001" b"000081ED" b"00000000" b"00000000"  # inode, mode, uid, gid
        b"00000001" b"00000000" b"00000002"  # links, mtime, file size
        b"00000000" b"00000000" b"00000000" b"00000000"  # device major and minor, twice
        b"00000002" b"00000000"  # name size with its NUL, check
        b"a\0"  # 110 + 2 bytes: no padding
        b"hi\0\0"
    )  # fmt: skip


def test_a_tree_lists_parents_first_and_keeps_symlinks(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to("../target")
    members = list(tree(tmp_path))
    assert [bytes(m[110:]).split(b"\0")[0] for m in members] == [b"d", b"d/link", b"TRAILER!!!"]
    assert members[1].rstrip(b"\0").endswith(b"../target")
    assert members[-1] == trailer()
