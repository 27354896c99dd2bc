"""A zoo of models, and what becomes of each when it is exported."""
