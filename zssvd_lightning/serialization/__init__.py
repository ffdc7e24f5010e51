"""What saved weights and configs say of compressed layers, and checks of both."""
