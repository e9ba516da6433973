"""Strategies side by side on one recorded stream: who learns what from the same clicks, in the same order."""
