"""Studies: create, join, run, resume, extend; where results come from and how they are kept."""
