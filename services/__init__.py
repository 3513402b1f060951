"""The services around the library: edge client, aggregator, inference, and what they share."""
