"""Imports what the commands use: the process that others are forked from has it ready."""

import gc
from importlib import import_module
from pkgutil import walk_packages

import dfmerge_studies

_MODULES = [found.name for found in walk_packages(dfmerge_studies.__path__, "dfmerge_studies.")]
_INSIDE_FUNCTIONS = ("alembic.command", "alembic.config", "datasets", "optuna_dashboard", "peft", "scipy.optimize")

for name in (*_INSIDE_FUNCTIONS, *_MODULES, "tests.project"):
    if not name.endswith("__main__"):
        import_module(name)
gc.collect()
gc.freeze()  # no collection of a child looks through all that, which would copy its memory
