"""Recipes for `mmesid run`; installed as `mmesid.recipes`, so that a wheel brings them along."""
