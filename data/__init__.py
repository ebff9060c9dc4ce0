"""Installed as the package `sptseg.assets`: the files under data/ that sptseg needs at run time."""
