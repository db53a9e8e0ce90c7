"""EST runtime: threads that share one device and take turns, in a virtual `torch.distributed` world."""
