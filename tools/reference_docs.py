"""Writes docs/settings.md and docs/control.md from the settings tree and the control schema.

Run as ``python -m tools.reference_docs``; a test fails when the pages are not what this would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ocssd_daemon import settings as sets
from ocssd_daemon.control import schema
from ocssd_daemon.nand.geometry import RANGES

DOCS = Path(__file__).resolve().parents[1] / "docs"

SETTINGS_HEAD = """# Settings

Every setting has a key, the same everywhere:

- in a TOML file: `ocssd-daemon --config device.toml`, where `geometry.pus` is `pus` in the table `[geometry]`;
- on the command line: `--set geometry.pus=8`, as often as needed; lists are separated by commas;
- in what `ocssd info` shows.

Later ones win: default, `--preset`, `--config`, flags such as `--size`, `--set`. Keys that end in `_bytes`, and `size`,
also take `4K`, `512M` or `1.5G` (powers of 1024). What is not a key, or breaks a rule, is refused with exit code 2 and
one line that names the key, the value and the rule; `ocssd-daemon --check` does only that.

```toml
size = "16G"
store = "/var/lib/ocssd/flash.img"

[ftl]
op = 0.28
victim = "cost-benefit"

[nbd]
listen = ["unix:/run/ocssd-nbd.sock"]
```

This page is made from the source by `python -m tools.reference_docs`.
"""

CONTROL_HEAD = """# Control socket

A running daemon answers JSON-RPC 2.0 on a Unix socket: one request a line, one answer a line, no batches. Its path is
`--control PATH`, by default the first transport's socket with `.ctl` behind it; who may open the file may ask.
`ocssd METHOD` is the same from a shell, `-o json` prints the result as it came:

```sh
ocssd --control /run/ocssd.sock.ctl stats -o json
```

Without `--control` it takes `$OCSSD_CONTROL`, or the only daemon that it finds in `./run`, `/run`, `/run/ocssd` and
`$XDG_RUNTIME_DIR`. Every answer comes within 100 ms, however busy the disk is.

| error code | meaning |
|---|---|
| -32700 | the line is not JSON |
| -32600 | it is no JSON-RPC 2.0 request, or longer than 1 MiB (then the connection is closed) |
| -32601 | no such method |
| -32602 | wrong parameters |
| -32603 | a bug in the daemon; its log has the details |
| -32000 | the device refuses; the message says why |

This page is made from the source by `python -m tools.reference_docs`.
"""


def settings_page() -> str:
    return SETTINGS_HEAD + "".join(_sections())


def _sections() -> Iterator[str]:
    """A table for each table of keys, in the order of the tree."""
    table = None
    for key, leaf in sets.KEYS.items():
        prefix = key.rpartition(".")[0]
        if prefix != table:
            table = prefix
            yield f"\n## {f'`{prefix}`' if prefix else 'The device'}\n\n"
            yield "| key | default | rule | meaning |\n|---|---|---|---|\n"
        yield f"| `{key}` | {_default(leaf.default)} | {_rule(key, leaf)} | {_meaning(leaf)} |\n"


def _default(value: Any) -> str:
    return "" if value in (None, (), "") else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _rule(key: str, leaf: sets.Leaf) -> str:
    table, _, name = key.rpartition(".")
    if key == "size":
        return sets.SIZE_RULE
    if table == "geometry":
        return "an integer from {} to {}".format(*RANGES[name])
    return sets.rule(leaf.type)


def _meaning(leaf: sets.Leaf) -> str:
    info = msgspec.inspect.type_info(leaf.type)
    extra = getattr(info, "extra_json_schema", None) or {}
    return str(extra.get("description", "")).replace("|", "\\|")


def control_page() -> str:
    return CONTROL_HEAD + "".join(_method(name, method) for name, method in schema.METHODS.items())


def _method(name: str, method: schema.Method) -> str:
    shapes = {"params": method.params, "result": method.result}
    parts = [
        f"\n{title}:\n\n```json\n{json.dumps(_inlined(shape), indent=2)}\n```\n" for title, shape in shapes.items()
    ]
    return f"\n## `{name}`\n\n{method.effect}\n" + "".join(parts)


def _inlined(shape: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON Schema of one struct, without the indirection through ``$defs``."""
    tree = msgspec.json.schema(shape)
    found: dict[str, Any] = tree["$defs"][shape.__name__]
    return found


PAGES = {"settings.md": settings_page, "control.md": control_page}

if __name__ == "__main__":
    for _name, _page in PAGES.items():
        (DOCS / _name).write_text(_page(), encoding="utf-8")
