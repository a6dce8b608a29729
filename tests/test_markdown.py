"""Every path, link and symbol of ours that a Markdown file names exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "packages/*/*.md",
        "integrations/*/*.md",
        "examples/**/*.md",
        "benchmarks/*.md",
    )
    for path in ROOT.glob(pattern)
)

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SYMBOL = re.compile(
    r"^(fi_(?:core|scheduler|sampling|cuda|triton|engine|adapters)(?:\.\w+)*|fi\.\w+(?:\.\w+)*)(?:\(.*\))?$"
)
TOP_LEVEL = ("packages/", "integrations/", "examples/", "benchmarks/", "docs/", "tests/", ".ci/")


def broken_references(path: Path, root: Path) -> list[str]:
    """What ``path`` names and does not exist, as texts. Placeholders in paths are written <like this>."""
    text = FENCE.sub("", path.read_text())
    found = [
        f"link {target}"
        for target in LINK.findall(text)
        if "://" not in target and not (path.parent / target).resolve().exists()
    ]
    for code in CODE.findall(text):
        if code.startswith(TOP_LEVEL) and "<" not in code and " " not in code:
            places = [root / code, *root.glob(code)]
            found += [] if any(place.exists() for place in places) else [f"path {code}"]
        match = SYMBOL.match(code)
        if match and not symbol_exists(match.group(1)):
            found.append(f"symbol {code}")
    return found


def symbol_exists(dotted: str) -> bool:
    """Whether ``dotted`` is a module of ours or an attribute (of an attribute ...) of one; "fi" is fi_core."""
    parts = dotted.split(".")
    parts[0] = "fi_core" if parts[0] == "fi" else parts[0]
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            fields = getattr(value, "__dataclass_fields__", {})
            if not hasattr(value, name) and name not in fields:
                return False
            value = getattr(value, name, None)
        return True
    return False


def test_documents_are_found():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/adding_a_backend.md"} <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_references_resolve(path):
    assert broken_references(path, ROOT) == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_each_kind_of_broken_reference_is_found(tmp_path):
    (tmp_path / "there.md").write_text("")
    document = tmp_path / "x.md"
    document.write_text(
        "[a](there.md#part) [b](absent.md) [c](https://example.org/absent) `docs/absent.md` `docs/<name>.md`\n"
        "`fi_core.plan` `fi.attention(q, kv)` `fi_core.records.Batch.table_row` `fi_core.nothing`\n"
        "`fi.Batch.nothing` `fid.x`\n"
        "```\n[d](also_absent.md)\n```\n"
    )
    assert broken_references(document, tmp_path) == [
        "link absent.md",
        "path docs/absent.md",
        "symbol fi_core.nothing",
        "symbol fi.Batch.nothing",
    ]
