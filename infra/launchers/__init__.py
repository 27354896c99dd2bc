"""Starting a training job on one of several engines: launch, status, cancel, logs."""
