"""Analyses for the report; they change nothing."""
