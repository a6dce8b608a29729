"""Build hook of the wheel: compiles the native module, in place for an editable install."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _load_builder(root: str) -> ModuleType:
    """``fi_scheduler.build_native`` by path: importing the package would need torch, which a build has not."""
    spec = importlib.util.spec_from_file_location("build_native", Path(root) / "src/fi_scheduler/build_native.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeModuleHook(BuildHookInterface[Any]):
    """A compiler that fails ends the build; without compiler or headers the wheel is pure Python, with a warning."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        builder = _load_builder(self.root)
        obstacle = builder.obstacle()
        if obstacle is not None:
            self.app.display_warning(f"fi-scheduler is built without its native module: {obstacle}")
            return
        if version == "editable":
            builder.build(builder.PACKAGE)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="fi-wheel-")
        module = builder.build(Path(self._scratch.name))
        build_data["force_include"][str(module)] = f"fi_scheduler/{module.name}"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()
