"""From the disk to a batch: order of samples, loaders, stateless random numbers, tables, image decoding, caches."""
