"""Read and write models: directories, Hub ids, adapters, digests."""
