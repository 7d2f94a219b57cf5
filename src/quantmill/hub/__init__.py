"""A repository as it travels: branch names and the model card. Sees folders and types, runs no model."""
