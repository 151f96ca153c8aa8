"""Variants of a network that differ in one thing, trained and measured alike, and a verdict per claim.

variants                      what is compared with what, after the paper's tables
plan, run, measure, probes    cells
verdict                       whether a difference holds
results, report, plots        tables and pictures
"""
