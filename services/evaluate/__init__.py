"""`feddymem evaluate`: methods compared on a data set, and the report."""
