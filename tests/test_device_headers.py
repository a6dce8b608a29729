"""docs/device_headers.md names every device header, each once, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "packages" / "fi-cuda" / "src" / "fi_cuda" / "include" / "fi"
PAGE = ROOT / "docs" / "device_headers.md"
ROW = re.compile(r"^\| `([\w/]+\.cuh)` \| \S.* \|$", re.MULTILINE)


def test_the_page_has_a_line_for_every_header():
    named = ROW.findall(PAGE.read_text())
    assert len(set(named)) == len(named)
    headers = {path.relative_to(HEADERS).as_posix() for path in HEADERS.rglob("*.cuh")}
    assert headers - set(named) == set(), f"{PAGE.name} needs a line for each of these"
    assert set(named) - headers == set(), f"{PAGE.name} names headers that do not exist"
