"""One file for each source of losses: formulas, and beside them what goes with them. All are registered here."""

from importlib import import_module
from pkgutil import iter_modules


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
