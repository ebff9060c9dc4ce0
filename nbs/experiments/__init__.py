"""Installed as the package `sptseg.experiments`: the recipes of every run."""
