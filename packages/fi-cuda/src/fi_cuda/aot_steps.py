"""The two steps of the ninja file of ``fi_cuda.aot`` in its folder: compile one recipe, and write the index.

A recipe (``recipes/<id>.json``) is a source, a target and the compiler's version; ``<id>`` names the spec, whatever its
headers say, so that an edge keeps its name when a header is edited. Compiling one puts the artifact into ``kernels/``
in the cache's format, and writes ``built/<id>.json`` (the edge's output: the artifact's name and content key) and
``built/<id>.d`` (the headers, for ninja). The index, ``kernels/index.json``, maps content keys to artifacts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fi_core.errors import FiError

from .cache import RECORD, read_artifact, write_artifact
from .command_line import exit_code
from .compile import compile_source, content_key
from .source import CompileTarget, KernelSource

RECIPES, BUILT, KERNELS, INDEX = "recipes", "built", "kernels", "index.json"
TEMPORARY = ".tmp-"


class AotError(FiError):
    """A folder of kernels made ahead of time is incomplete, damaged, or was prepared for another compiler."""


def recipe_name(source: KernelSource, target: CompileTarget) -> str:
    """The id of the recipe: the stem, the arch and a digest of the generated text and the flags."""
    digest = hashlib.sha256("\n".join((source.text, *target.flags)).encode()).hexdigest()[:16]
    return f"{source.stem}-{target.arch}-{digest}"


def recipe_text(source: KernelSource, target: CompileTarget, compiler: str) -> str:
    """The recipe as JSON; the include folders are absolute."""
    folders = [str(folder.absolute()) for folder in source.include_folders]
    fields = {"stem": source.stem, "symbol": source.symbol, "text": source.text, "include_folders": folders}
    return json.dumps({"source": fields, "target": asdict(target), "compiler": compiler}, indent=1) + "\n"


def read_recipe(path: Path) -> tuple[KernelSource, CompileTarget, str]:
    """Source, target and compiler version of a recipe."""
    record = json.loads(path.read_text())
    fields = record["source"]
    folders = tuple(map(Path, fields.pop("include_folders")))
    return KernelSource(include_folders=folders, **fields), CompileTarget(**record["target"]), record["compiler"]


def compile_recipe(recipe: Path) -> None:
    """Compile ``recipe`` of the folder two levels above it; raises CompileError, or AotError if NVRTC has changed."""
    folder = recipe.parent.parent
    source, target, compiler = read_recipe(recipe)
    artifact = compile_source(source, target)
    if artifact.compiler != compiler:
        raise AotError(f"{recipe} is for NVRTC {compiler}, but {artifact.compiler} is installed: prepare it again")
    final = folder / KERNELS / artifact.name
    temporary = final.with_name(f"{TEMPORARY}{artifact.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # an interrupted step leaves one
    write_artifact(artifact, temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    built = folder / BUILT / recipe.name
    headers = " ".join(_escaped(path.absolute()) for _, path in sorted(source.headers().items()))
    built.with_suffix(".d").write_text(f"{BUILT}/{recipe.name}: {headers}\n")
    built.write_text(json.dumps({"name": artifact.name, "content_key": content_key(source, target)}) + "\n")


def _escaped(path: Path) -> str:
    """A path in a depfile, as ninja reads those of gcc."""
    return str(path).replace("$", "$$").replace("#", "\\#").replace(" ", "\\ ")


def write_index(built: Sequence[Path]) -> None:
    """Write the index of what ``built`` (outputs of ``compile_recipe`` in one folder) names, and remove the artifacts
    that it does not name; raises AotError for an artifact that is absent or damaged."""
    kernels = built[0].parent.parent / KERNELS
    names = {}
    for path in built:
        record = json.loads(path.read_text())
        if read_artifact(kernels / record["name"]) is None:
            raise AotError(f"{kernels / record['name']} is absent or damaged: remove {path} and build again")
        names[record["content_key"]] = record["name"]
    for path in kernels.iterdir():
        is_artifact = (path / RECORD).is_file() or path.name.startswith(TEMPORARY)
        if is_artifact and path.name not in names.values():
            shutil.rmtree(path)
    (kernels / INDEX).write_text(json.dumps(names, indent=1, sort_keys=True) + "\n")


def run_step(step: str, paths: Sequence[Path]) -> None:
    """``compile`` one recipe, or write the ``index`` of what was built; raises as these do."""
    if step == "compile":
        (recipe,) = paths
        compile_recipe(recipe)
    else:
        write_index(paths)


def main(arguments: Sequence[str] | None = None) -> int:
    """``compile RECIPE`` or ``index BUILT...``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fi_cuda.aot_steps", description=__doc__.partition("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("compile", help="compile one recipe").add_argument("paths", metavar="RECIPE", type=Path, nargs=1)
    steps.add_parser("index", help="write the index").add_argument("paths", metavar="BUILT", type=Path, nargs="+")
    parsed = parser.parse_args(arguments)

    def run() -> int:
        run_step(parsed.step, parsed.paths)
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
