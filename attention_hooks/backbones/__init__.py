"""What is known of a kind of network: its blocks, where tokens lie, how to reach them."""
