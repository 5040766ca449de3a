"""Connect to torchrec and torch.distributed: processes, sharding, agreement between ranks."""
