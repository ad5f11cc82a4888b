"""Many machines: which there are, how they are reached, what they are told, and what is wrong with them."""
