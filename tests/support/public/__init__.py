"""Public architectures: what they are, and what is said of them."""
