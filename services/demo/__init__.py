"""`feddymem demo`: a whole federation as separate processes on this machine, and its report."""
