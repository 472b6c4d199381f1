"""Where tensors live: pages of the K/V cache and the memory at hand."""
