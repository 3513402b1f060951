"""Who may have images inspected."""

from __future__ import annotations

from services.runtime.identity import Role

CALLERS = frozenset({Role.LINE, Role.SITE, Role.OPERATOR})
