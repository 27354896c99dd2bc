"""What tests, benchmarks and `make month` share; a module for each subject, with a name that says it."""
