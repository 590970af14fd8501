"""Entry point of ``python -I -S -B <this directory> …``.

The directory is registered as the package ``millrace_runner`` and taken off ``sys.path``: its modules can use
relative imports, and no module of a model can be confused with one of ours.
"""

import importlib
import importlib.util
import os
import sys

PACKAGE = "millrace_runner"


def _register_package() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = importlib.util.spec_from_file_location(PACKAGE, os.path.join(here, "__init__.py"), submodule_search_locations=[here])
    if spec is None or spec.loader is None:
        raise ImportError(f"{here} cannot be imported")
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _register_package()
    sys.exit(importlib.import_module(f"{PACKAGE}.program").main(sys.argv[1:]))
