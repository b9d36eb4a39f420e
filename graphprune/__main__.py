"""``python -m graphprune``."""

from __future__ import annotations

import sys

from graphprune.cli import main

sys.exit(main())
