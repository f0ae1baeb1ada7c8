"""Configurations of `accelerate launch`; installed as `mmesid.accelerate_configs`: a wheel brings them along."""
