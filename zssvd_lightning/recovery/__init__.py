"""Train the factors afterwards: settings, methods, the run, teachers, and rollback."""
