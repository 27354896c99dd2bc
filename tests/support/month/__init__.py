"""The month that `make month` lives through: its nights, its project, and what has to be true afterwards."""
