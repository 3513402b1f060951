"""What all services share: settings, servers and channels, arrays on the wire, publishing, logs, metrics."""
