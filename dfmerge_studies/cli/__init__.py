"""The command line: thin skins over the Python API, and the only place that prints."""
