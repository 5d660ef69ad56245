"""Roots that a job writes to and reads from, behind one small interface: S3, a folder, a mounted claim.

`base` is the interface, `s3` and `folder` are the two kinds, `roots` opens one from a `StoreTarget`, `preflight` tells what
is wrong before training starts, `fetch` brings models and data to local disk.
"""
