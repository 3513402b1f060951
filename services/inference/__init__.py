"""The inference service: scores images with the current releases."""
