"""The dist-info folders that make a plain source tree discoverable say what the packages' pyproject files say."""

import configparser
import email
import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = {
    project["name"]: project
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
    for project in [tomllib.loads(path.read_text())["project"]]
}
PLUGINS = sorted(name for name, project in PROJECTS.items() if "fi" in project.get("entry-points", {}))


def test_the_backends_are_known():
    assert {"fi-core", "fi-cuda", "fi-triton"} <= set(PLUGINS)


def test_every_plugin_package_has_a_folder_and_nothing_else_has():
    expected = {f"{name.replace('-', '_')}-{PROJECTS[name]['version']}.dist-info" for name in PLUGINS}
    assert {path.name for path in (ROOT / "packages/dist-info").iterdir()} == expected


@pytest.mark.parametrize("name", PLUGINS)
def test_folder_matches_pyproject(name):
    project = PROJECTS[name]
    folder = ROOT / "packages/dist-info" / f"{name.replace('-', '_')}-{project['version']}.dist-info"
    metadata = email.message_from_string((folder / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == (project["name"], project["version"])
    entry_points = configparser.ConfigParser()
    entry_points.read(folder / "entry_points.txt")
    assert {group: dict(entry_points[group]) for group in entry_points.sections()} == project["entry-points"]


@pytest.mark.parametrize("name", PLUGINS)
def test_entry_points_lead_to_modules_with_hooks(name):
    for value in PROJECTS[name]["entry-points"]["fi"].values():
        module = importlib.import_module(value)
        assert any(hasattr(item, "fi_impl") for item in vars(module).values()), f"{value} implements no hook"


@pytest.mark.parametrize("name", ["fi-core", "fi-cuda", "fi-triton"])
def test_version_of_a_backend_is_the_version_of_its_distribution(name):
    assert importlib.import_module(name.replace("-", "_")).__version__ == PROJECTS[name]["version"]
