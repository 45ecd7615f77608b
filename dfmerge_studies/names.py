"""What may be the name of a study, an expert or a task: it appears in paths, URLs and pages."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
