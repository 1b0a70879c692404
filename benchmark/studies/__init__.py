"""Answers to one question each: python -m benchmark.studies.NAME."""
