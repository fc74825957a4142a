"""Whole-file transforms and reports: no model is ever built here."""
