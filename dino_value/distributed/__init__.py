"""Several processes that take the steps of one: the group, whose shard of a batch, sums over all, FSDP."""
