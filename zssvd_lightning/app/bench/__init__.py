"""Speed and memory of compressed models beside the dense model, and how far each is from its limit."""
