"""`finetune`: the command line. It depends on `finetune_api`, but not on the operator or the trainer."""
