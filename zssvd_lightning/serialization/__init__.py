"""Descriptions of compressed layers in saved weights and configs, and checks of both."""
