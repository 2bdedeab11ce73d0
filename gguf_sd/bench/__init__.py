"""Comparisons of models and programs: pictures, times, memory, and a report of them."""
