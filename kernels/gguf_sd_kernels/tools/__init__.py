"""Programs that check the kernels without a GPU."""
