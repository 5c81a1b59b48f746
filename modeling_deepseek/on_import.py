"""What is to be done with a module the moment it is imported, without importing it: that can take seconds."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class OnImport(importlib.abc.MetaPathFinder):
    """Finds the modules that `then` names as Python would, and calls its function for each as soon as it has run. Works
    for as long as it stands in front on `sys.meta_path`; modules that are there already are the caller's business."""

    def __init__(self, then: Mapping[str, Callable[[ModuleType], Any]]):
        self.then = then
        self.searching = False

    def find_spec(self, fullname, path, target=None):
        if fullname not in self.then or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                self.then[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import's loader
        return spec
