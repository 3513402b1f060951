"""The `feddymem` command."""
