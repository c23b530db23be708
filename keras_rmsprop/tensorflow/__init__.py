"""What only the TensorFlow backend needs; imported only under it."""
