"""The Open Inference Protocol's adapter: what a request's tensors become, and what results become."""
