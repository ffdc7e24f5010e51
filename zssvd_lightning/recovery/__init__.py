"""Training of the factors after compression: settings, methods, the run, teachers and rollback."""
