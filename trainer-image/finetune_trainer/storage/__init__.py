"""Stores with a common interface: S3, a folder or mounted volume claim, and a web server (read-only).

`base` is the interface; `s3`, `folder` and `web` implement it; `roots` opens a store from a `StoreTarget`; `preflight` checks a
store before training; `errors` converts the exceptions of the S3 client. Users call `python -m finetune_trainer.storage` from the command line.
"""
