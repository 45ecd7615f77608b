"""The trials of a study, as workers claim, run, tell and repeat them; nothing here knows what they evaluate."""
