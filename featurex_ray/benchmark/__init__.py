"""Measures a machine: what each stage costs alone, the bound that implies, and what runs reach."""
