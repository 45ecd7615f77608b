"""Dynamic Fisher-weighted Merging of language models, as Optuna studies."""
