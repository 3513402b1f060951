"""The edge client: a site's images to a reduced memory bank, in every round."""
