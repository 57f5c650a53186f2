"""What capturing costs the client: processor time of Genie's client beside plain eager PyTorch's."""
