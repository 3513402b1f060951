"""What is between the network and the servicers."""
