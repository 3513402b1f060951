"""FedDyMem: federated anomaly detection with dynamic memory (arXiv 2502.21012), as a library without a network.

The way of the data: `images` decodes, `backbone` makes patch features in a `feature_space`, `local_update` trains the
`generator` by the `metric_loss`, `memory_reduce` makes a `memory` bank of the patches, `aggregate` merges banks to the
global memory, `scoring` compares images with it. `federation` runs the loop in one process.
"""

__version__ = "0.1.0"
