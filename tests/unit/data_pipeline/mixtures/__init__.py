"""Mixtures of data sets, joins, and several texts a record."""
