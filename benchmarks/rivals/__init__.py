"""What graphreg promises of its noise, asked of F.dropout, Keras 3 on torch, and Flax on JAX: the table of docs/randomness.md."""
