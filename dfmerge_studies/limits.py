"""The largest numbers that a user can mean: larger ones are slips, or would take all time or memory there is."""

from __future__ import annotations

TRIALS = 10**6  # of a study
SEED = 2**63 - 1
COUNT = 10**9  # of rows, inputs, tokens
COEFFICIENT = 10**6  # by its size
STEPS = 10**6  # between the bounds of a coefficient
LAYERS = 10**4  # of a model
WORKERS = 1024  # processes on one machine
SEEDS = 1000  # of a comparison
POINTS = 10**4  # of a figure's line
GRID = 100  # coefficients per expert of a landscape; its models are the square
INTEGER = 2**63 - 1  # what databases keep
VALUES = 10**5  # in a spec, aliases counted as often as they stand
DEPTH = 50  # of fields in fields in a spec
SECONDS = 86_400  # between two looks
