"""Find the layers of a model, replace them, adapt them with PEFT, and copy models."""
