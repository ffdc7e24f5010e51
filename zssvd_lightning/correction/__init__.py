"""Corrections between truncations: gradient steps and closed-form refits."""
