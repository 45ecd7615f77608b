"""Importance of parameters: the diagonal Fisher information of a task, and its cache."""
