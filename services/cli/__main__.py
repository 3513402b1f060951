"""`python -m services.cli`, the same as `feddymem`."""

from services.cli.main import main

main()
