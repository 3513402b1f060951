"""Names of sites and federations."""

from __future__ import annotations

NAME_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$"
NAME_RULE = "1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit"
"""What `NAME_PATTERN` says, for messages."""
