"""The aggregator as a process, spoken to over a socket by sites that behave, and by sites that do not."""
