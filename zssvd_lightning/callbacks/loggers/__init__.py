"""Pictures of a compression for the loggers of a Trainer."""
