"""Imports what the commands use, and has libraries look up what they keep: other processes are forked from this one."""

import gc
from importlib import import_module
from pkgutil import walk_packages

import optuna
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import dfmerge_studies

_MODULES = [found.name for found in walk_packages(dfmerge_studies.__path__, "dfmerge_studies.")]
_INSIDE_FUNCTIONS = (
    "alembic.command",
    "alembic.config",
    "alembic.migration",
    "datasets",
    "greenlet",
    "optuna._gp.acqf",
    "optuna._gp.optim_mixed",
    "optuna_dashboard",
    "peft",
    "scipy.io",
    "scipy.optimize",
)

for name in (*_INSIDE_FUNCTIONS, *_MODULES, "tests.project"):
    if not name.endswith("__main__"):
        import_module(name)
get_checkpoint_conversion_mapping("t5")  # compiles a thousand patterns at the first call
optuna.storages.RDBStorage("sqlite://").engine.dispose()  # maps classes to tables, and reads the migrations
gc.collect()
gc.freeze()  # no collection of a child looks through all that, which would copy its memory
gc.set_threshold(20_000)  # as in conftest.py
