"""Small, readable models built on the operations: one file a model."""
