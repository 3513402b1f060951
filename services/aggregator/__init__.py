"""The aggregator: rounds, k-means, versions, publishing."""
