"""Malformed messages and images: against real processes, and guided by coverage within one."""
